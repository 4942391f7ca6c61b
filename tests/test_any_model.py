"""Freezing other people's models: exact, resumable, and what it refuses. docs/freeze_any_model.md names these tests."""

from __future__ import annotations

import gc
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import any_model_scenarios as scenarios
import plain_deepspeed_scenarios as plain
import pytest
import torch
from any_model_scenarios import COMMON, MODELS, RARE, SAVES, UNITS, frozen_at, name_of, unit_of
from processes import run_forked, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from vitfreeze.checkpoint import CheckpointError, find_checkpoint, load_engine, read_weights, save_engine
from vitfreeze.config import ConfigError
from vitfreeze.engine import FreezingEngine
from vitfreeze.engine.units import plan_groups

PAGE = Path(__file__).resolve().parents[1] / "docs" / "freeze_any_model.md"
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="FREEZING A GPT-2 IS NOT TESTED: transformers is not installed (it needs Python 3.11)"
)
DS_CONFIG = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0}
Key = tuple[str, int, str]


def can_run(keys: Sequence[Key]) -> list[Key]:
    return [key for key in keys if HAS_TRANSFORMERS or key[0] != "gpt2"]


# -- real models on two ranks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any_model")


@pytest.fixture(scope="module")
def common(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(scenarios.follow_common, can_run(COMMON), folder)


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(scenarios.follow_all, can_run(RARE), tmp_path_factory.mktemp("rare"), timeout=560)


def marks_of(key: Key) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow, pytest.mark.timeout(600)] if key in RARE else []
    return [*slow, NEEDS_TRANSFORMERS] if key[0] == "gpt2" else slow


@pytest.fixture(params=[pytest.param(key, id=name_of(key), marks=marks_of(key)) for key in (*COMMON, *RARE)])
def key(request: pytest.FixtureRequest) -> Key:
    return request.param


@pytest.fixture
def ranks(key: Key, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue("common" if key in COMMON else "rare")


def of(ranks: list[dict[str, Any]], key: Key) -> list[dict[Any, Any]]:
    return [rank[name_of(key)] for rank in ranks]


def sizes_at(name: str, step: int) -> dict[str, int]:
    """Elements of the parameters that train at a step."""
    trained = [*UNITS[name], "rest"][frozen_at(step) :]
    model = MODELS[name]()
    return {key: value.numel() for key, value in model.named_parameters() if unit_of(key, UNITS[name]) in trained}


def same(left: Any, right: Any) -> bool:
    """Compare to the bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    return bool(left == right)


@pytest.mark.distributed
def test_losses_are_those_of_plain_torch_with_frozen_layers(key: Key, ranks: list[dict[str, Any]]) -> None:
    # With bf16 the halves of the batch are rounded before they are averaged.
    tolerance = 1e-6 if key[2] == "fp32" else 2e-3
    for rank, run in zip(ranks, of(ranks, key), strict=True):
        assert run["whole"]["losses"] == pytest.approx(rank[f"{key[0]}-{key[2]}"], rel=tolerance)


@pytest.mark.distributed
def test_only_what_trains_moves(key: Key, ranks: list[dict[str, Any]]) -> None:
    for run in of(ranks, key):
        for step, moved in enumerate(run["whole"]["moved"]):
            trained = set(sizes_at(key[0], step))
            assert moved <= trained, "frozen weights stay as they are to the bit"
            # In bf16 a small step may round to none.
            assert moved == trained or (key[2] == "bf16" and len(moved) > 0.3 * len(trained))


@pytest.mark.distributed
def test_state_is_that_of_the_active_share(key: Key, ranks: list[dict[str, Any]]) -> None:
    bytes_each = 8 if key[1:] == (0, "fp32") else 12  # there the weights are the master weights
    for step in range(scenarios.STEPS):
        expected = bytes_each * sum(sizes_at(key[0], step).values())
        used = [run["whole"]["bytes"][step][0] for run in of(ranks, key)]
        assert (used == [expected] * 2) if key[1] == 0 else (sum(used) == expected)
        for run in of(ranks, key):
            used_here, held = run["whole"]["bytes"][step]
            assert used_here <= held <= used_here + 12 * 4 * 2 * len(run["whole"]["weights"]), "padding alone"


@pytest.mark.distributed
def test_units_leave_in_their_order(key: Key, ranks: list[dict[str, Any]]) -> None:
    for run in of(ranks, key):
        assert run["whole"]["events"] == [((name,), (name,)) for name in [*UNITS[key[0]]][:3]]


@pytest.mark.distributed
@pytest.mark.parametrize("step", SAVES)
def test_resume_after_each_freeze_is_exact_to_the_bit(key: Key, ranks: list[dict[str, Any]], step: int) -> None:
    for run in of(ranks, key):
        resumed, whole = run[step], run["whole"]
        assert (resumed["step"], resumed["frozen"], resumed["extra"]) == (
            step,
            frozen_at(step - 1),
            {"seen": [step - 1]},
        )
        assert resumed["losses"] == whole["losses"][step:]
        for part in ("weights", "groups", "scalars", "masters"):
            assert same(resumed[part], whole[part]), part


@pytest.mark.distributed
def test_resume_brings_back_random_numbers(common: list[dict[str, Any]]) -> None:
    losses = [rank["dropout"]["whole"]["losses"] for rank in common]
    assert losses[0] != pytest.approx(common[0]["convnext-2-fp32"]["whole"]["losses"], rel=1e-6)
    for rank in common:
        for step in SAVES:
            assert same(rank["dropout"][step]["weights"], rank["dropout"]["whole"]["weights"])


@pytest.mark.distributed
def test_checkpoints_travel_between_stages_and_ranks(common: list[dict[str, Any]], folder: Path) -> None:
    whole = common[0]["convnext-2-fp32"]["whole"]
    alone = run_ranks(scenarios.travel, folder / "convnext-2-fp32", world_size=1)[0]
    for results in (common[0]["stages"], alone):
        for stage, run in results.items():
            assert run["losses"] == pytest.approx(whole["losses"][4:], rel=1e-6), stage
    assert same(common[0]["stages"][2]["weights"], whole["weights"])


@pytest.mark.distributed
def test_checkpoints_hold_frozen_weights_too(common: list[dict[str, Any]], folder: Path) -> None:
    """DeepSpeed's own omit them in stage 1 and with bf16."""
    for key in can_run(COMMON):
        found = find_checkpoint(folder / name_of(key) / str(SAVES[-1]))
        assert found is not None
        weights, frozen = (
            read_weights(found),
            set(dict(MODELS[key[0]]().named_parameters())) - sizes_at(key[0], 6).keys(),
        )
        assert frozen
        ours = common[0][name_of(key)]["whole"]
        for name in frozen:
            assert weights[name].dtype == torch.float32
            assert torch.equal(weights[name], ours["masters"][name])


# -- plain DeepSpeed ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_us() -> dict[str, Any]:
    return run_ranks(plain.everything)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("case", plain.CASES)
def test_requires_grad_alone_does_not_freeze(without_us: dict[str, Any], case: str) -> None:
    """Each line of the page's table. If one fails with another DeepSpeed, that one has changed: correct the page."""
    seen = without_us[case]
    assert (seen["moved"] == 0) == (case == "0-fp32")
    whole, layer = 3 * (8 * 8 + 8), 8 * 8 + 8
    assert seen["before"]["reduced"] == whole
    assert seen["after"]["reduced"] == (whole if case == "1-bf16-fp32-sums" else whole - layer)
    assert seen["before"]["gathered"] == seen["after"]["gathered"] == (0 if case.startswith("0") else whole)
    assert seen["state"][0] == seen["state"][1] > 0, "no byte of state is freed"


@pytest.mark.distributed
def test_other_ways_to_freeze_by_hand_do_not_work(without_us: dict[str, Any]) -> None:
    assert without_us["2-fp32-offload"]["moved"] > 1.3 * without_us["2-fp32"]["moved"], "the last gradient, again"
    assert without_us["mid-step"] > 0
    assert without_us["pop"] == "IndexError"


@pytest.mark.slow
@pytest.mark.distributed
def test_freezing_on_one_rank_alone_ends_the_job() -> None:
    with pytest.raises(AssertionError, match="a step was taken together"):
        run_ranks(plain.freeze_on_one_rank, timeout=60)


# -- units, and what is refused ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers and a head, with dropout and batch norm in the first; the output is a dict."""

    def __init__(self, *, tied: bool = False, recomputes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recomputes = recomputes
        self.first = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.second, self.third, self.head = (nn.Linear(6, 6) for _ in range(3))
        if tied:
            self.head.weight = self.third.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        for layer in (self.second, self.third):
            x = torch.tanh(recompute(layer, x, use_reentrant=False) if self.recomputes else layer(x))
        return {"loss": self.head(x).square().mean()}


LAYERS: Mapping[str, list[str]] = {name: [name] for name in ("first", "second", "third")}


@pytest.fixture(scope="module")
def old_objects() -> Iterator[None]:
    """Keep what is there already out of the collections by which engines go: they would take most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def engines(old_objects: None) -> Iterator[Callable[..., FreezingEngine]]:
    """A function that builds an engine on one rank; all end with the test."""
    built: list[FreezingEngine] = []

    def build(model: nn.Module | None = None, *, units: Any = LAYERS, **settings: Any) -> FreezingEngine:
        settings = {"ds_config": DS_CONFIG, "micro_batch": 4, **settings}
        built.append(FreezingEngine(model or Net(), units=units, **settings))
        return built[-1]

    yield build
    for engine in built:
        engine.destroy()


def train(engine: FreezingEngine, steps: range = range(3)) -> None:
    for step in steps:
        torch.manual_seed(step)
        engine.set_learning_rates(dict.fromkeys(engine.unit_names, 1e-2))
        output = engine(torch.randn(4, 6).to(engine.dtype))
        engine.backward(output["loss"])
        engine.step()


def weights_of(engine: FreezingEngine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.module.state_dict().items()}


def moved(engine: FreezingEngine, before: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in engine.module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("units", "sentence"),
    [
        ({"a": ["first"], "b": ["first.0.weight"]}, "parameter 'first.0.weight' belongs to two units: 'a' and 'b'"),
        ({"a": ["first", "fourth"]}, "prefix 'fourth' of unit 'a' matches no trainable parameter"),
        ({"a": ["fir"]}, "prefix 'fir' of unit 'a' matches no trainable parameter"),
        ({"a": ["first"], "b": []}, "unit 'b' is empty"),
        ({"rest": ["first"]}, "no unit can be named 'rest'"),
        (None, "Net has no freeze units of its own: give `units`"),
    ],
)
def test_units_that_do_not_fit_are_refused_by_name(units: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan_groups(Net(), units)


def test_all_units_may_freeze_while_the_rest_trains(engines: Callable[..., FreezingEngine]) -> None:
    engine = engines()
    train(engine)
    engine.freeze(3, step=3)
    assert engine.unit_names == ("rest",)
    before = weights_of(engine)
    train(engine)
    assert {"head.weight", "head.bias"} == {name for name in moved(engine, before) if not name.startswith("first.1.")}
    with pytest.raises(ValueError, match="2 frozen layers, but 3 are frozen for good"):
        engine.freeze(2, step=6)
    with pytest.raises(ValueError, match="4 frozen layers, but there are 3 that can freeze"):
        engine.freeze(4, step=6)
    whole = engines(units={**LAYERS, "head": ["head"]})
    with pytest.raises(ValueError, match="nothing would be left to learn"):
        whole.freeze(4, step=0)


def test_rates_of_strangers_are_refused(engines: Callable[..., FreezingEngine]) -> None:
    with pytest.raises(ValueError, match="a learning rate for firts, which is no unit; units that train: rest, third"):
        engines().set_learning_rates({"firts": 0.1, "second": 0.1, "third": 0.1, "rest": 0.1})


@pytest.mark.parametrize("name", UNITS)
def test_a_half_precision_prefix_needs_a_model_that_knows_it(name: str, engines: Callable[..., FreezingEngine]) -> None:
    with pytest.raises(ConfigError, match="allowed are auto and fp32, because the forward pass of Net takes no"):
        engines(prefix_precision="bf16")


@pytest.mark.parametrize(
    ("ds_config", "sentence"),
    [
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 0}, "3 gathers every weight, frozen or not"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 0},
            "a dropped layer's memory never returns",
        ),
    ],
)
def test_stage_3_and_offload_are_refused_with_the_reason(
    ds_config: Any, sentence: str, engines: Callable[..., FreezingEngine]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        engines(ds_config=ds_config)


def test_a_model_without_a_loss_is_refused(engines: Callable[..., FreezingEngine]) -> None:
    with pytest.raises(TypeError, match="the model returned Tensor without a scalar loss"):
        engines(nn.Linear(6, 6), units={"w": ["weight"]})(torch.zeros(4, 6))


# -- tied weights ------------------------------------------------------------------------------------------------------


def test_a_tied_weight_trains_as_long_as_any_of_its_units(
    engines: Callable[..., FreezingEngine], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = engines(Net(tied=True))
    assert "third.weight of unit 'third' is tied to head.weight of unit 'rest', so it trains as long as" in caplog.text
    engine.freeze(3, step=0)
    before = weights_of(engine)
    train(engine)
    assert {"third.weight", "head.weight"} <= moved(engine, before)
    assert "third.bias" not in moved(engine, before)


def test_a_tied_weight_freezes_when_its_unit_has_all_its_names(
    engines: Callable[..., FreezingEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines(Net(tied=True), units={"third": ["third", "head.weight"], "second": ["second"]})
    assert "is tied" not in caplog.text
    engine.freeze(1, step=0)
    before = weights_of(engine)
    train(engine)
    assert not {"third.weight", "head.weight", "third.bias"} & moved(engine, before)
    assert {"head.bias", "second.weight"} <= moved(engine, before)


def test_a_unit_of_nothing_but_ties_is_refused() -> None:
    with pytest.raises(ValueError, match="unit 'third' is empty: all its parameters are tied to those of units that"):
        plan_groups(Net(tied=True), {"third": ["third.weight"], "second": ["second"]})


@NEEDS_TRANSFORMERS
def test_gpt2_has_one_group_for_its_tied_weight() -> None:
    names = [name for plan in plan_groups(MODELS["gpt2"](), UNITS["gpt2"]) for name in plan.parameter_names]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
    (embed,) = (plan for plan in plan_groups(MODELS["gpt2"](), UNITS["gpt2"]) if plan.unit.name == "embed")
    assert embed.parameter_names == ("transformer.wte.weight", "transformer.wpe.weight")


# -- what else a frozen unit does --------------------------------------------------------------------------------------


def test_running_statistics_stand_still_when_asked(engines: Callable[..., FreezingEngine]) -> None:
    statistics = {"first.1.running_mean", "first.1.running_var", "first.1.num_batches_tracked"}
    for asked in (False, True):
        engine = engines(eval_frozen_units=asked)
        train(engine)
        engine.freeze(1, step=3)
        before = weights_of(engine)
        engine.module.train()  # as after an evaluation
        train(engine)
        assert {name for name in moved(engine, before) if name.startswith("first")} == (set() if asked else statistics)
        assert [module.training for module in engine.module.first] == [not asked] * 3  # dropout among them
        assert engine.module.second.training


def test_gradients_pass_through_a_frozen_unit_in_the_middle(engines: Callable[..., FreezingEngine]) -> None:
    engine = engines(units={"third": ["third"], "second": ["second"], "first": ["first"]})
    oracle = Net()
    named = dict(oracle.named_parameters())
    groups = [{"params": [value], "weight_decay": 0.05 if value.ndim > 1 else 0.0} for name, value in named.items()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(6):
        engine.freeze(step // 2, step=step)
        train(engine, range(step, step + 1))
        torch.manual_seed(step)
        for name, value in named.items():
            frozen = ("third", "second")[: step // 2]
            value.grad = None
            value.requires_grad_(not name.startswith(frozen) if frozen else True)
        oracle(torch.randn(4, 6))["loss"].backward()
        optimizer.step()
    for name, value in engine.module.named_parameters():
        torch.testing.assert_close(value, named[name], rtol=0, atol=1e-6)


def test_activation_checkpointing_changes_nothing(engines: Callable[..., FreezingEngine]) -> None:
    weights = []
    for recomputes in (False, True):
        engine = engines(Net(recomputes=recomputes))
        for step in range(6):
            engine.freeze(step // 2, step=step)
            train(engine, range(step, step + 1))
        weights.append(weights_of(engine))
    assert same(*weights)


# -- checkpoints of one rank -------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_with_running_statistics(
    engines: Callable[..., FreezingEngine], tmp_path: Path
) -> None:
    assert load_engine(tmp_path, engines()) is None
    engine = engines()
    train(engine)
    engine.freeze(1, step=3)
    save_engine(tmp_path, engine, step=3, extra={"best": 0.5})
    saved, other = weights_of(engine), engines()
    checkpoint = load_engine(tmp_path, other)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.extra, other.frozen_layers) == (3, {"best": 0.5}, 1)
    assert same(weights_of(other), saved)
    built_with_it = engines(frozen_layers=checkpoint.frozen_layers)
    load_engine(checkpoint.path, built_with_it)
    for one in (engine, other, built_with_it):
        train(one, range(3, 6))
    assert same(weights_of(other), weights_of(engine))
    assert same(weights_of(built_with_it), weights_of(engine))
    with pytest.raises(CheckpointError, match="was saved with save_engine and has no configuration of a run"):
        checkpoint.read_config()


def test_a_unit_that_waits_to_be_dropped_is_dropped_by_loading(
    engines: Callable[..., FreezingEngine], tmp_path: Path
) -> None:
    engine = engines(min_steps_between_drops=5)
    train(engine)
    for step in (3, 4):
        event = engine.freeze(step - 2, step=step)
    assert event is not None
    assert (event.units, event.dropped) == (("second",), ())
    save_engine(tmp_path, engine, step=4)
    other = engines()
    load_engine(tmp_path, other)
    load_engine(tmp_path, engine)
    for one in (engine, other):
        train(one)
    assert engine.optimizer_state_bytes() == other.optimizer_state_bytes()
    assert same(weights_of(engine), weights_of(other))


@pytest.mark.parametrize(
    ("model", "units", "frozen", "sentence"),
    [
        (Net, LAYERS, 3, "the saved state has 2 frozen layers, this engine 3, and those are frozen for good"),
        (Net, {"first": ["first"], "more": ["second", "third"]}, 0, "has other units than this engine: with 2 frozen"),
        (
            Net,
            {**LAYERS, "head": ["head"]},
            0,
            "these groups of parameters are not the same: head.decay, head.no_decay",
        ),
        (lambda: nn.Sequential(Net()), {"a": ["0.first"], "b": ["0.second"], "c": ["0.third"]}, 0, "tensor 0.first"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_nothing_changes(
    engines: Callable[..., FreezingEngine], tmp_path: Path, model: Any, units: Any, frozen: int, sentence: str
) -> None:
    engine = engines()
    engine.freeze(2, step=0)
    train(engine)
    save_engine(tmp_path, engine, step=3)
    other = engines(model(), units=units, frozen_layers=frozen)
    before = weights_of(other)
    with pytest.raises(ValueError, match=sentence) as error:
        load_engine(tmp_path, other)
    assert "\n" not in str(error.value)
    assert not moved(other, before)


def test_a_damaged_checkpoint_falls_back_and_bad_extra_is_refused(
    engines: Callable[..., FreezingEngine], tmp_path: Path
) -> None:
    engine = engines()
    for step in (1, 2):
        path = save_engine(tmp_path, engine, step=step).path
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_engine(tmp_path, engine, step=3, extra={"tensor": torch.zeros(1)})
    assert path is not None
    (path / "weights.safetensors").write_bytes(b"damaged")
    found = load_engine(tmp_path, engine)
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match="is damaged"):
        load_engine(path, engine)


# -- the page ----------------------------------------------------------------------------------------------------------


@NEEDS_TRANSFORMERS
def test_the_code_on_the_page_runs_and_goes_on(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    outputs = []
    for steps in ("20", "40"):  # the second run goes on from the first
        program = code.replace("range(first, 40)", f"range(first, {steps})")
        assert steps == "40" or program != code
        program += "\nprint(saved.step if saved else 0, engine.unit_names, engine.frozen_layers)\n"
        done = run_forked(exec, program, {"__name__": "__main__"}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout.splitlines()[-1])
    assert outputs == [
        "0 ('rest', 'block_2', 'block_1', 'block_0') 1",
        "20 ('rest', 'block_2') 3",
    ]


def test_the_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    folder = Path(__file__).parent
    written = {
        name for path in folder.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named
    assert named <= written, f"tests that do not exist: {named - written}"
