import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from clustr_mm import ClusTR
from clustr_mm.benchmark import (
    Backbone,
    BackboneCase,
    OperatorCase,
    Report,
    Row,
    Settings,
    SweepCase,
    TextbookDPCKNN,
    add_ratios,
    find_backbone,
    run,
    runner,
    textbook_dpc_knn,
)
from clustr_mm.benchmark.cases import Case, Prepared, stage_counts
from clustr_mm.benchmark.memory import (
    GIB,
    CaseError,
    Limits,
    Usage,
    describe,
    probe_cpu,
    probe_cuda,
)
from clustr_mm.benchmark.plot import label_sizes
from clustr_mm.benchmark.stages import split_by_stage
from clustr_mm.ops import DPCKNN, dpc_knn

ROOT = Path(__file__).resolve().parents[1]
ARCH = dict(
    embed_dims=[16, 16, 32, 32],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[2, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)
TINY = Backbone('tiny', dict(type='ClusTR', arch=ARCH))
LIMITS = Limits(memory=4 * GIB, seconds=60, threads=1)
COUNTS = (4, 17)


def randn(*shape, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **kwargs)


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools/analysis_tools/benchmark.py'
    spec = importlib.util.spec_from_file_location('benchmark_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ticks:
    """A clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@dataclass(frozen=True, kw_only=True)
class FakeCase(Case):
    """Takes the given times, and says when it is called."""

    name: str
    clock: Ticks
    times: list
    calls: list
    input: str = '64x64'
    section: str = 'backbones'
    pixels: int = 4096
    fails: list = field(default_factory=list)

    def prepare(self):
        times = iter(self.times)

        def call():
            self.calls.append(self.name)
            passed = next(times)
            if isinstance(passed, BaseException):
                raise passed
            self.clock.now += passed

        return Prepared(call)


@pytest.fixture
def no_probe(monkeypatch):
    monkeypatch.setattr(runner, 'probe_cpu', lambda case, limits: Usage(200.0, 50.0))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)


class TestTextbook:
    @pytest.mark.parametrize('k', [1, 4, 5])
    @pytest.mark.parametrize('seed', range(3))
    def test_integers_on_a_line_with_many_ties(self, seed, k):
        tokens = torch.zeros(2, 60, 16)
        tokens[..., 3] = (3 * randn(2, 60, seed=seed)).round()
        assert_same(textbook_dpc_knn(tokens, COUNTS, k), dpc_knn(tokens, COUNTS, k))

    @pytest.mark.parametrize('k', [3, 5, 200])
    def test_scattered_tokens(self, k):
        tokens = randn(2, 150, 24, dtype=torch.float64).float().double()
        assert_same(textbook_dpc_knn(tokens, COUNTS, k), dpc_knn(tokens, COUNTS, k))

    def test_constant_tokens(self):
        tokens = torch.ones(1, 30, 16)
        assert_same(textbook_dpc_knn(tokens, COUNTS), dpc_knn(tokens, COUNTS))

    def test_half_precision_is_computed_in_float32(self):
        tokens = randn(1, 40, 16).bfloat16()
        with torch.autocast('cpu', torch.bfloat16):
            found = textbook_dpc_knn(tokens, COUNTS)
        assert_same(found, textbook_dpc_knn(tokens.float(), COUNTS))

    def test_preset_runs_it(self, monkeypatch):
        from clustr_mm.benchmark import textbook

        calls = []

        def spy(*args):
            calls.append(args)
            return dpc_knn(*args)

        monkeypatch.setattr(textbook, 'textbook_dpc_knn', spy)
        cfg = dict(TINY.cfg, clusterer=dict(type=TextbookDPCKNN))
        backbone = Backbone('slow', cfg)
        BackboneCase(backbone=backbone, size=(32, 32), batch=1).prepare().run()
        assert len(calls) == 4
        calls.clear()
        BackboneCase(backbone=TINY, size=(32, 32), batch=1).prepare().run()
        assert not calls


class TestBackbones:
    @pytest.mark.parametrize(
        ('name', 'parameters'),
        [
            ('clustr-t', 11_169_417),
            ('clustr-s', 22_177_941),
            ('clustr-b', 39_733_210),
            ('pvtv2-b2', 24_849_856),
            ('swin-t', 27_520_698),
            ('resnet-50', 23_508_032),
            ('convnext-t', 27_821_472),
        ],
    )
    def test_presets(self, name, parameters):
        model = find_backbone(name).build()
        assert sum(p.numel() for p in model.parameters()) == parameters
        model.eval()
        with torch.no_grad():
            outs = model(torch.rand(1, 3, 64, 64))
        assert [out.shape[-1] for out in outs] == [16, 8, 4, 2]

    def test_suffixes(self):
        backbone = find_backbone('clustr-b-w112-textbook')
        clusterer = dict(type=TextbookDPCKNN, window=112)
        assert backbone.cfg == dict(type='ClusTR', arch='b', clusterer=clusterer)
        linear = find_backbone('clustr-s-linear').cfg
        assert linear['clusterer'] == dict(type='KMeans')
        assert linear['max_clusters'] == 49
        assert find_backbone('clustr-t').cfg == dict(type='ClusTR', arch='t')

    @pytest.mark.parametrize('name', ['clustr-x', 'clustr-s-w0', 'clustr-s-w', 'x.py'])
    def test_unknown_names_list_the_presets(self, name):
        with pytest.raises(ValueError, match=f'{name!r}.*clustr-s-w224.*pvtv2-b2'):
            find_backbone(name)

    def test_config_of_a_toolbox(self):
        path = ROOT / 'configs/mmseg/fpn_clustr-t_4xb4-80k_ade20k-512x512.py'
        backbone = find_backbone(str(path))
        assert (backbone.name, backbone.scope) == (path.stem, 'mmseg')
        assert 'clustr_mm' in backbone.imports
        assert sum(p.numel() for p in backbone.build().parameters()) == 11_169_417

    def test_nothing_asks_for_weights(self, tmp_path):
        path = tmp_path / 'peer.py'
        path.write_text(
            "default_scope = 'mmdet'\n"
            "model = dict(type='ResNet', depth=18, pretrained='https://none.invalid/a',"
            "init_cfg=dict(type='Pretrained', checkpoint='https://none.invalid/b'))"
        )
        model = find_backbone(str(path)).build()
        assert 'none.invalid' not in str(model.init_cfg)

    @pytest.mark.parametrize('text', ['a = 1', 'model = dict(backbone=dict())', 'a ='])
    def test_files_without_a_backbone(self, tmp_path, text):
        path = tmp_path / 'bad.py'
        path.write_text(text)
        with pytest.raises(ValueError, match=r'bad\.py'):
            find_backbone(str(path))


@MODELS.register_module()
class Watched(nn.Module):
    """Notes in which state it is called."""

    seen = []

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.layer.weight.register_hook(lambda grad: self.seen.append('backward'))

    def forward(self, x):
        y = self.layer(x)
        self.seen.append((self.training, torch.is_grad_enabled(), y.dtype, x.shape))
        return [y]


class TestCases:
    @pytest.mark.parametrize('mode', ['forward', 'train'])
    @pytest.mark.parametrize('amp', [None, 'bf16'])
    def test_modes_and_amp(self, mode, amp):
        Watched.seen.clear()
        case = BackboneCase(
            backbone=Backbone('w', dict(type='Watched')),
            size=(5, 7),
            batch=2,
            mode=mode,
            amp=amp,
        )
        prepared = case.prepare()
        prepared.run()
        train = mode == 'train'
        dtype = torch.bfloat16 if amp else torch.float32
        assert Watched.seen[0] == (train, train, dtype, (2, 3, 5, 7))
        assert Watched.seen[1:] == ['backward'] * train
        assert prepared.model.layer.weight.grad is None

    def test_operators_get_the_same_tokens(self, monkeypatch):
        from clustr_mm.benchmark import cases

        seen = []
        for name in cases.OPERATORS:
            monkeypatch.setitem(cases.OPERATORS, name, lambda *args: seen.append(args))
            case = OperatorCase(name=name, batch=2, tokens=150, channels=8)
            case.prepare().run()
        (first, counts), (second, _) = seen
        assert first.shape == (2, 150, 8) and counts == (2, 9)
        assert torch.equal(first, second)
        assert (case.input, case.pixels) == ('2x150x8', 2400)

    def test_sweep_clusters_windows(self, monkeypatch):
        seen = []

        def spy(self, tokens, counts):
            seen.append((tuple(tokens.shape), tuple(counts)))
            return dpc_knn(tokens, counts, self.k)

        monkeypatch.setattr(DPCKNN, 'find', spy)
        for name in ('whole map', 'windows of 224 px', 'k-means, 49'):
            SweepCase(name=name, size=(64, 448), batch=1).prepare().run()
        assert seen == [
            ((1, 16 * 112, 64), stage_counts(16 * 112)),
            ((2, 16 * 56, 64), stage_counts(16 * 56)),
        ]


class TestRunner:
    settings = Settings(LIMITS, rounds=4, warmup=1)

    def fake(self, name, times, clock, calls, **kwargs):
        return FakeCase(
            name=name, times=times, clock=clock, calls=calls, batch=2, **kwargs
        )

    def test_rounds_take_turns_and_medians_are_right(self, no_probe):
        clock, calls, steps = Ticks(), [], []
        fast = self.fake('fast', [9, 0.1, 0.2, 0.3, 0.4], clock, calls)
        slow = self.fake('slow', [9, 1.0, 1.0, 1.0, 5.0], clock, calls)
        settings = self.settings
        rows = list(run([[fast, slow]], settings, lambda n, _: steps.append(n), clock))
        assert calls == ['fast', 'slow'] * 5
        assert sum(steps) == runner.count_steps([[fast, slow]], settings) == 12
        assert [row.milliseconds for row in rows] == pytest.approx([250, 1000])
        assert [row.iqr_ms for row in rows] == pytest.approx([150, 1000])
        assert [row.images_per_second for row in rows] == pytest.approx([8, 2])
        assert [row.rounds for row in rows] == [4, 4]
        assert rows[0].peak_mib == 200 and rows[0].imports_mib == 50

    def test_failures_leave_the_others_alone(self, monkeypatch):
        def probe(case, limits):
            if case.name == 'big':
                raise CaseError('needs more than 4 GiB of memory')
            return Usage(1.0)

        monkeypatch.setattr(runner, 'probe_cpu', probe)
        clock, calls = Ticks(), []
        group = [
            self.fake('big', [1] * 5, clock, calls),
            self.fake('late', [1, 1, ValueError('no\nmore')], clock, calls),
            self.fake('good', [1] * 5, clock, calls),
        ]
        big, late, good = run([group], self.settings, clock=clock)
        assert big.error == 'needs more than 4 GiB of memory' and 'big' not in calls
        assert late.error == 'ValueError: no' and late.milliseconds is None
        assert calls.count('late') == 3
        assert good.error is None and good.milliseconds == 1000

    def test_interruption_keeps_what_is_there(self, no_probe):
        clock, calls, rows = Ticks(), [], []
        group = [
            self.fake('a', [1, 1, 3], clock, calls),
            self.fake('b', [1, 1, KeyboardInterrupt()], clock, calls),
        ]
        never = [self.fake('c', [], clock, calls)]
        with pytest.raises(KeyboardInterrupt):
            for row in run([group, never], self.settings, clock=clock):
                rows.append(row)
        assert [(row.name, row.rounds) for row in rows] == [('a', 2), ('b', 1)]
        assert rows[0].milliseconds == 2000

    def test_ratios_compare_like_with_like(self):
        def row(name, size, ms, mib, section='backbones'):
            row = Row(section, name, size, 1, 1, 'forward', 'cpu', None)
            row.milliseconds, row.imports_mib = ms, 30.0
            row.peak_mib = mib and mib + 30.0
            return row

        rows = [
            row('a', '64x64', 10.0, 100.0),
            row('b', '64x64', 40.0, 50.0),
            row('b', '96x96', 80.0, 70.0),
            row('b', '64x64', 1.0, 1.0, section='sweep'),
            row('c', '64x64', None, None),
        ]
        add_ratios(rows, dict(backbones='a', sweep='whole map'))
        assert [r.speedup for r in rows] == [1, 0.25, None, None, None]
        assert [r.memory_ratio for r in rows] == [1, 0.5, None, None, None]

    def test_cuda_waits_for_the_device(self, monkeypatch):
        events = []
        monkeypatch.setattr(torch.cuda, 'synchronize', lambda *_: events.append('sync'))
        clock = Ticks()

        def tick():
            events.append('clock')
            return clock()

        runner.time_call(lambda: events.append('run'), 'cuda', tick)
        assert events == ['sync', 'clock', 'run', 'sync', 'clock']

    def test_cuda_memory_leaves_others_out(self, monkeypatch):
        sizes = dict(memory_allocated=3 * 2**20, max_memory_allocated=10 * 2**20)
        for name, size in sizes.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size)
        monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda _: None)
        monkeypatch.setattr(torch.cuda, 'synchronize', lambda _: None)
        calls = []
        case = self.fake('a', [1], Ticks(), calls, device='cuda')
        assert probe_cuda(case)[1] == Usage(7.0)
        assert calls == ['a']


class TestSplit:
    def test_each_part_gets_its_time(self, monkeypatch):
        """Time passes only where the test says so."""
        clock = Ticks()
        model = ClusTR(ARCH).eval()

        def advance(seconds):
            clock.now += seconds

        def slow_clustering(self, tokens, counts):
            advance(1)
            return dpc_knn(tokens, counts, self.k)

        monkeypatch.setattr(DPCKNN, 'find', slow_clustering)
        for stage in model.stages:
            stage.patch_embed.register_forward_hook(lambda *_: advance(100))
            for block in stage.blocks:
                block.attn.q.register_forward_hook(lambda *_: advance(10))

        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            split = split_by_stage(model, lambda: model(images), 3, clock=clock)
        numbers = [(s.stage, s.clustering, s.attention, s.rest) for s in split]
        assert numbers == [
            (1, 2000, 20000, 100000),
            (2, 1000, 10000, 100000),
            (3, 1000, 10000, 100000),
            (4, 0, 10000, 100000),
        ]

    def test_leaves_no_trace(self):
        model = ClusTR(ARCH).eval()

        def broken():
            raise KeyError

        with pytest.raises(KeyError):
            split_by_stage(model, broken, 1)
        attn = model.stages[0].blocks[0].attn
        assert 'cluster' not in vars(attn)
        assert not attn._forward_hooks and not attn._forward_pre_hooks
        assert not model.stages[0]._forward_hooks

    def test_only_clustr_and_only_forward(self, no_probe):
        settings = Settings(LIMITS, rounds=1, warmup=0, split=True)
        peer = Backbone('watched', dict(type='Watched'))
        groups = [
            [
                BackboneCase(backbone=b, size=(32, 32), batch=1, mode=mode)
                for b in (TINY, peer)
            ]
            for mode in ('forward', 'train')
        ]
        rows = list(run(groups, settings))
        assert [row.error for row in rows] == [None] * 4
        assert [len(row.split or ()) for row in rows] == [4, 0, 0, 0]


class TestMemory:
    def test_peak_of_the_case_not_of_this_process(self):
        # Freed at once, but this process has held it.
        torch.ones(3 * GIB // 8).sum()
        case = OperatorCase(name='textbook', batch=1, tokens=4096, channels=16)
        peak, imports = probe_cpu(case, LIMITS)
        matrix = 4096**2 * 4 / 2**20
        assert 2 * matrix < peak - imports < 6 * matrix
        assert peak < 1536

    def test_limit(self):
        case = OperatorCase(name='textbook', batch=1, tokens=2**15, channels=16)
        with pytest.raises(CaseError, match='needs more than 2 GiB of memory'):
            probe_cpu(case, Limits(memory=2 * GIB, threads=1))

    def test_time_limit(self):
        case = OperatorCase(name='dpc_knn', batch=1, tokens=64, channels=16)
        with pytest.raises(CaseError, match='takes longer than 0.01 s'):
            probe_cpu(case, Limits(memory=4 * GIB, seconds=0.01))

    def test_errors_take_one_line(self):
        assert describe(ValueError('a\nb')) == 'ValueError: a'
        assert describe(KeyError()) == 'KeyError: no message'
        gpu = torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate')
        assert describe(gpu) == 'out of memory'
        assert len(describe(ValueError('x' * 999))) == 120


class TestTool:
    def config(self, folder, name, **backbone):
        path = folder / f'{name}.py'
        backbone = dict(type='ClusTR', arch=ARCH, **backbone)
        path.write_text(f'model = dict(backbone={backbone!r})')
        return str(path)

    def test_whole_run(self, tool, tmp_path, capsys):
        backbones = [
            self.config(tmp_path, 'plain'),
            self.config(tmp_path, 'windows', clusterer=dict(type='DPCKNN', window=16)),
            self.config(tmp_path, 'broken', drop_rate=7),
        ]
        options = '--sizes 32x64 --rounds 2 --warmup 0 --split --device cpu'
        out = tmp_path / 'out'
        argv = ['--backbones', *backbones, *options.split(), '--out', str(out)]
        assert tool.main([*argv, '--baseline', backbones[1]]) == 0
        assert 'Traceback' not in capsys.readouterr().out

        result = json.loads((out / 'benchmark.json').read_text())
        assert result['versions']['torch'] == torch.__version__.split('+')[0]
        assert result['baselines']['backbones'] == 'windows'
        rows = result['rows']
        assert [(row['name'], row['input']) for row in rows] == [
            (name, '32x64') for name in ('plain', 'windows', 'broken')
        ]
        for row in rows:
            if row['name'] == 'broken':
                assert row['error'] == 'ValueError: drop_rate must be in [0, 1), got 7'
                assert row['milliseconds'] is None
                continue
            base = rows[1]
            assert row['error'] is None
            assert row['speedup'] == base['milliseconds'] / row['milliseconds']
            used, of_base = (r['peak_mib'] - r['imports_mib'] for r in (row, base))
            assert row['memory_ratio'] == used / of_base
            assert row['peak_mib'] > row['imports_mib'] > 0
            assert [part['stage'] for part in row['split']] == [1, 2, 3, 4]

        text = (out / 'benchmark.md').read_text()
        tables = [line for line in text.splitlines() if line.startswith('|')]
        assert sum(line.startswith('| broken |') for line in tables) == 1
        assert sum(line.startswith('| plain |') for line in tables) == 1 + 4
        assert 'drop_rate must be in' in text
        assert (out / 'benchmark.png').read_bytes().startswith(b'\x89PNG')
        assert {path.suffix for path in out.iterdir()} == {'.md', '.json', '.png'}

    def test_sizes_too_close_for_two_labels_share_one(self):
        sizes = [(224, 224), (800, 1344), (1024, 1024), (512, 512), (224, 224)]
        rows = [
            Row('backbones', 'a', f'{h}x{w}', h * w, 1, 'forward', 'cpu', None)
            for h, w in sizes
        ]
        assert label_sizes(rows) == {
            224**2: '224x224',
            512**2: '512x512',
            1024**2: '1024x1024\n800x1344',
        }

    def test_interruption_saves(self, tool, tmp_path, no_probe):
        clock = Ticks()
        times = [1, KeyboardInterrupt()]
        case = FakeCase(name='a', times=times, clock=clock, calls=[], batch=1)
        settings = Settings(LIMITS, rounds=2, warmup=0)
        report = Report(settings, dict(backbones='a'), 'benchmark.py')
        assert tool.measure([[case]], settings, report, tmp_path) == 130
        (row,) = json.loads((tmp_path / 'benchmark.json').read_text())['rows']
        assert row['rounds'] == 1 and row['name'] == 'a'
        assert '| a | 64x64 |' in (tmp_path / 'benchmark.md').read_text()

    def test_operator_and_sweep(self, tool):
        argv = ['--operator', '1x16384x64', '4x3136x64', '--sweep', '224', '800x1344']
        args = tool.make_parser().parse_args(argv)
        tool.check(args)
        groups = tool.make_groups(args)
        assert [[(c.section, c.name, c.input) for c in group] for group in groups] == [
            [('operator', name, shape) for name in ('textbook', 'dpc_knn')]
            for shape in ('1x16384x64', '4x3136x64')
        ] + [
            [
                ('sweep', name, size)
                for name in ('whole map', 'windows of 224 px', 'k-means, 49')
            ]
            for size in ('224x224', '800x1344')
        ]

    def test_modes(self, tool):
        argv = '--backbones clustr-t --sizes 64 --mode both --amp bf16 --device cpu'
        args = tool.make_parser().parse_args(argv.split())
        tool.check(args)
        cases = [case for group in tool.make_groups(args) for case in group]
        assert [(c.mode, c.amp) for c in cases] == [
            ('forward', 'bf16'),
            ('train', 'bf16'),
        ]

    @pytest.mark.parametrize(
        ('argv', 'message'),
        [
            ('--backbones vgg', 'vgg.*clustr-t, .*convnext-t'),
            ('--sizes 12y', "a size must be.*800x1344.*'12y'"),
            ('--sizes 0', 'a size must be'),
            ('--sizes 1x2x3', 'a size must be'),
            ('--operator 1x2', "a shape must be like.*'1x2'"),
            ('--sweep big', 'a size must be'),
            ('--backbones clustr-t --baseline swin-t', 'baseline.*clustr-t.*swin-t'),
            ('--backbones clustr-t clustr-t', 'different names'),
            ('--batch 0', '--batch must be at least 1'),
            ('--memory-limit 0', '--memory-limit must be above 0'),
            ('--device tpu', 'cpu or cuda'),
            ('--mode fast', "invalid choice: 'fast'"),
        ],
    )
    def test_bad_arguments(self, tool, capsys, tmp_path, argv, message):
        with pytest.raises(SystemExit) as stop:
            tool.main([*argv.split(), '--out', str(tmp_path / 'out')])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count('\n') == 1
        assert re.search(message, error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    settings = Settings(LIMITS, rounds=2, warmup=1, split=True)
    groups = [
        [BackboneCase(backbone=TINY, size=(64, 64), batch=2, mode=mode, device='cuda')]
        for mode in ('forward', 'train')
    ]
    rows = list(run(groups, settings))
    for row in rows:
        assert row.error is None
        assert row.milliseconds > 0 and row.peak_mib > 0
    assert [part.stage for part in rows[0].split] == [1, 2, 3, 4]
