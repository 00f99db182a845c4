"""Data-parallel training over two processes on the CPU."""

import os
import subprocess
import sys
import time

import distributed_worker as worker
import torch

SECONDS = 120


def run_ranks(folder):
    """Run the worker once per rank; what each has saved."""
    # gloo would look for a network interface by the name of the host.
    interface = 'lo0' if sys.platform == 'darwin' else 'lo'
    environment = dict(os.environ, OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME=interface)
    logs = [folder / f'rank{rank}.log' for rank in range(worker.RANKS)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open('w') as file:
                command = [sys.executable, worker.__file__, str(rank), str(folder)]
                processes.append(
                    subprocess.Popen(
                        command, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        end = time.monotonic() + SECONDS
        for process in processes:
            process.wait(timeout=max(0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # A process that had to be killed has a negative code.
    codes = [process.returncode for process in processes]
    assert not any(codes), '\n'.join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f'rank{rank}.pth') for rank in range(worker.RANKS)]


def check_case(results, case):
    """Compare what the ranks saved with one process on the joint batch."""
    model = worker.make_model(**worker.CASES[case])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    joint = worker.train(model, model, range(worker.RANKS))

    # Not vacuous: the ranks see different images.
    assert results[0]['losses'] != results[1]['losses'], case
    for step in range(worker.STEPS):
        mean = sum(result['losses'][step] for result in results) / worker.RANKS
        torch.testing.assert_close(mean, joint['losses'][step], rtol=1e-9, atol=0)
    for result in results:
        assert result['with_gradient'] == trained, case
        assert result['exchanged'] == trained, case
        assert result['parameters'].keys() == before.keys(), case
    for name, old in before.items():
        where = f'{case}: {name}'
        first, second = (result['parameters'][name] for result in results)
        assert first.equal(second), where
        close(first, joint['parameters'][name], where)
        assert first.equal(old) != (name in trained), where


def close(actual, expected, where):
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-12, msg=lambda text: f'{where}\n{text}'
    )


# One test, not one per case: the processes take seconds to start, and the workers of
# pytest would start them several times.
def test_two_processes_train_like_one(tmp_path):
    ranks = run_ranks(tmp_path)
    for case in worker.CASES:
        check_case([rank[case] for rank in ranks], case)
    for name, plain in ranks[0]['plain']['parameters'].items():
        close(ranks[0]['checkpointed']['parameters'][name], plain, name)
    # The check itself: a parameter without use does not go unnoticed.
    for rank in ranks:
        assert 'Expected to have finished reduction' in rank['unused']
