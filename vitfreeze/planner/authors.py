"""What the authors measured, with the settings of a run or near them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from vitfreeze.config import Config, CurriculumConfig, Duration


@dataclass(frozen=True, kw_only=True)
class AuthorsResult:
    """Top-1 accuracy of ViT-B after 100 epochs of pre-training and 100 of fine-tuning, as ViTFreeze reports it."""

    how: str
    t_0: float
    scale_lr: bool
    top1: float
    hours: float | None = None  # on one V100


AUTHORS_RESULTS: tuple[AuthorsResult, ...] = (
    AuthorsResult(how="cubic", t_0=0.65, scale_lr=True, top1=79.1),
    AuthorsResult(how="cubic", t_0=0.70, scale_lr=True, top1=80.7),
    AuthorsResult(how="cubic", t_0=0.75, scale_lr=True, top1=81.5),
    AuthorsResult(how="cubic", t_0=0.80, scale_lr=True, top1=82.5, hours=42),
    AuthorsResult(how="cubic", t_0=0.80, scale_lr=False, top1=82.85),
    AuthorsResult(how="cubic", t_0=0.85, scale_lr=True, top1=82.65),
    AuthorsResult(how="cubic", t_0=0.90, scale_lr=True, top1=82.8),
    AuthorsResult(how="linear", t_0=0.50, scale_lr=True, top1=82.5),
)
AUTHORS_MODEL = "vit_base_patch16"
AUTHORS_LENGTH = Duration(100, "epochs")
AUTHORS_WITHOUT_FREEZING = AuthorsResult(how="off", t_0=1.0, scale_lr=True, top1=83.2, hours=48)


def describe_authors(config: Config) -> str:
    """Return what the authors measured with the settings of a run, or near them; empty if it is not a run of theirs."""
    if not _is_authors_run(config) or config.freeze.mode == "adaptive" or config.optim.schedule != "cosine":
        return ""
    t_0 = 1.0 if config.freeze.mode == "off" else config.freeze.t_0
    has_curriculum = config.curriculum != CurriculumConfig()
    if has_curriculum or (config.freeze.mode == "schedule" and config.freeze.rates != "cosine"):
        return ""
    return find_authors_results(config.freeze.how, t_0=t_0, scale_lr=config.freeze.scale_lr)


def _is_authors_run(config: Config) -> bool:
    run = config.run
    return config.model.size == AUTHORS_MODEL and run.task == "pretrain" and run.length == AUTHORS_LENGTH


def find_authors_results(how: str, *, t_0: float, scale_lr: bool) -> str:
    """Return the authors' accuracy at a setting, or at its nearest neighbours below and above."""
    if t_0 == 1:
        return _format_result(AUTHORS_WITHOUT_FREEZING)
    known = [r for r in AUTHORS_RESULTS if r.how == how and r.scale_lr == scale_lr]
    exact = [result for result in known if abs(result.t_0 - t_0) < 1e-6]
    if exact:
        return _format_result(exact[0])
    below = max((r for r in known if r.t_0 < t_0), key=lambda r: r.t_0, default=None)
    above = min((r for r in known if r.t_0 > t_0), key=lambda r: r.t_0, default=AUTHORS_WITHOUT_FREEZING)
    if not known:
        return "not measured by the authors"
    low = _format_result(below) if below else f"not measured by the authors below t_0 {above.t_0:g}"
    return f"{low}; {_format_result(above)}"


def _format_result(result: AuthorsResult) -> str:
    hours = f" in {result.hours:g} V100-hours" if result.hours else ""
    setting = "without freezing" if result.how == "off" else f"at t_0 {result.t_0:g}"
    return f"{result.top1:g} % {setting}{hours}"
