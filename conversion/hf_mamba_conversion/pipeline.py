"""The conversion from beginning to end: open, plan, check, write, verify, describe, put in place."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .card import write_card
from .checks import check_plan, model_class, target_dtype
from .destination import check_destination, check_space, new_folder
from .errors import ConversionError
from .export import export_config, export_rules
from .files import sha256
from .formats import ConversionPlan, Format, TensorRule, detect_format
from .hub import check_repository, push
from .progress import Progress
from .report import ConversionReport
from .source import CheckpointSource
from .tokenizer import copy_tokenizer, find_tokenizer
from .verify import apply_rule, verify
from .writer import BinWriter, SafetensorsWriter, TensorSpec, parse_size

__all__ = ["DTYPES", "TARGETS", "convert"]

TARGETS = ("hf", "mamba_ssm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHARD_SIZE = "5GB"
# elements looked at together when values are checked or compared
BLOCK = 1 << 22


def convert(
    source: str | Path,
    dest: str | Path | None = None,
    *,
    to: str = "hf",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    tokenizer: str | Path | None = None,
    verify: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    license: str | None = None,
    revision: str | None = None,
    options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint of any known format into a folder that `from_pretrained` loads.

    Memory beyond the mapped input stays below one tensor of the result, or two where it is cast; with `verify`, the model is
    loaded in fp32 as well. The source is never changed. `dest` appears, complete, as the last step; on any error it does not
    exist.

    Args:
        source: a folder, a weight file, or an id on the Hub.
        dest: the folder to be made; it may exist if it is empty. Only a dry run can do without.
        to: "hf" for transformers' format, or "mamba_ssm" for that of state-spaces/mamba (Mamba and Mamba-2 only).
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's. Parameters that the model computes with in fp32
            (those of the recurrence, and routers) are not rounded.
        max_shard_size: the largest weight file, such as "5GB" (the default) or a number of bytes.
        tokenizer: a folder, a file or a Hub id whose tokenizer goes into `dest`; by default the one beside the weights.
        verify: compare the result's logits with an independent forward of the source; differing results are not kept.
        dry_run: stop after all checks that need no weights. A source on the Hub is downloaded into the cache all the same.
        push_to_hub: upload the finished folder to this repository, checked as `hf-mamba push` does; `private` makes a new one
            private. Only with to="hf": mamba_ssm's format is a pickle.
        license: for the card, one of the Hub's identifiers; by default that of the source's card. An upload needs one.
        revision: branch, tag or commit, if `source` is on the Hub.
        options: choices that a format leaves open, by name (see `Format.options`).
        progress: is told of stages and bytes.

    Raises:
        ConversionError: the checkpoint, or an argument, cannot be used; nothing was written.
        UnsupportedFormatError: the same, for a format that is known and cannot be held by any class here.

    Example:
        >>> from hf_mamba_conversion import convert
        >>> convert("state-spaces/mamba-130m", "mamba-130m", verify=True).parameters  # doctest: +SKIP
        129135360
    """
    progress = progress or Progress()
    cast = _parse_dtype(dtype)
    destination = None if dest is None else Path(dest).expanduser()
    _check_arguments(to, destination, max_shard_size, dry_run, push_to_hub, private)
    shard_size = parse_size(DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    if push_to_hub is not None and not dry_run:
        license = check_repository(push_to_hub, str(source), license)

    progress.stage("Opening")
    with CheckpointSource(source, revision=revision) as opened:
        if destination is not None:
            check_destination(destination, Path(source).expanduser())
        form = detect_format(opened)
        progress.stage("Planning")
        plan = form.plan(opened, form.resolve_options(options or {}))
        parameters = check_plan(opened, plan)
        files = find_tokenizer(tokenizer, opened)
        job = _Job(opened, form, plan, to, cast, shard_size, progress)
        report = job.report(parameters)
        report.command = _command(
            source,
            dest,
            to=to,
            dtype=None if cast is None else str(cast).removeprefix("torch."),
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            revision=revision,
            verify=verify,
            push_to_hub=push_to_hub,
            private=private,
            license=license,
            options=options or {},
        )
        progress.planned(report)
        if dry_run or destination is None:
            return report
        check_space(destination, report.nbytes)
        with new_folder(destination) as folder:
            job.write(folder, report, files, required=tokenizer is not None, check=verify)
            progress.stage("Writing the model card")
            name = (push_to_hub or destination.absolute().name).split("/")[-1]
            write_card(folder, report, name, push_to_hub, license)
            progress.stage("Putting the folder in place")
        report.destination = destination
    if push_to_hub is not None:
        progress.stage("Uploading")
        report.url = push(destination, push_to_hub, private, str(license))
    return report


class _Job:
    """What the stages of one conversion share."""

    def __init__(
        self,
        source: CheckpointSource,
        form: Format,
        plan: ConversionPlan,
        to: str,
        cast: torch.dtype | None,
        shard_size: int,
        progress: Progress,
    ) -> None:
        self.source, self.form, self.plan, self.to = source, form, plan, to
        self.shard_size, self.progress = shard_size, progress
        # by the key in the plan; the names of the result may differ
        self.dtypes = {rule.target: target_dtype(source, plan.config, rule, cast) for rule in plan.rules}
        dtypes = list(self.dtypes.values())
        self.rules: list[TensorRule] = plan.rules
        self.aliases: dict[str, str] = {}
        if to == "mamba_ssm":
            self.exported = export_config(plan.config)
            self.rules, self.aliases = export_rules(plan.rules, tied=plan.config.tie_word_embeddings)
        self.specs = [
            TensorSpec(rule.target, rule.shape, dtype) for rule, dtype in zip(self.rules, dtypes, strict=True)
        ]
        sizes: Counter[torch.dtype] = Counter()
        for spec in self.specs:
            sizes[spec.dtype] += spec.nbytes
        plan.config.dtype = sizes.most_common(1)[0][0]
        plan.config.architectures = [model_class(plan.config).__name__]

    def report(self, parameters: int) -> ConversionReport:
        config = self.plan.config
        return ConversionReport(
            source=self.source.location,
            format=self.form.name,
            title=self.form.title,
            to=self.to,
            config=config,
            target_config=self.config_dict(),
            class_name="MambaLMHeadModel" if self.to == "mamba_ssm" else model_class(config).__name__,
            parameters=parameters,
            dtypes=dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in self.specs)),
            nbytes=sum(spec.nbytes for spec in self.specs),
            options=dict(self.plan.options),
            choices={name: self.form.options[name] for name in self.plan.options},
            notes=list(self.plan.notes),
            warnings=list(self.source.warnings),
            command="",
        )

    def config_dict(self) -> dict[str, Any]:
        """Content of the result's `config.json`."""
        return self.exported if self.to == "mamba_ssm" else json.loads(self.plan.config.to_json_string())

    def write(self, folder: Path, report: ConversionReport, files: list[Path], required: bool, check: bool) -> None:
        """Fill `folder` and complete `report`."""
        self._check_derivable()
        outputs = self._write_weights(folder, report)
        self.progress.stage("Writing configuration and tokenizer")
        copied, warnings = copy_tokenizer(files, folder, self.plan.config, required)
        report.warnings += warnings
        report.target_config = self.config_dict()
        text = json.dumps(report.target_config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        if check:
            self.progress.stage("Verifying")
            report.verified = verify(folder, self.source, self.form, self.plan, self.dtypes, self.to)
        inputs = [*self.source.weight_files, *self._configurations()]
        self.progress.stage("Computing checksums", sum(file.stat().st_size for file in inputs))
        report.inputs = {file.name: sha256(file, self.progress.advance) for file in inputs}
        for name in ("config.json", *copied, *(f.name for f in folder.glob("*.bin"))):
            outputs[name] = sha256(folder / name)
        report.outputs = dict(sorted(outputs.items()))

    def _configurations(self) -> list[Path]:
        names = ("config.json", "params.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
        return [self.source.folder / name for name in names if (self.source.folder / name).is_file()]

    def _check_derivable(self) -> None:
        pairs = self.plan.derivable
        self.progress.stage("Comparing tied tensors", sum(self.source.infos[key].nbytes for key in pairs))
        for key, original in pairs.items():
            if not _same_bytes(self.source.read(key), self.source.read(original), self.progress.advance):
                raise ConversionError(
                    f"{key!r} differs from {original!r}, although the configuration says that they are tied. Converting "
                    "would lose it: set `tie_embeddings` (or `tie_word_embeddings`) to false in a copy of config.json."
                )

    def _write_weights(self, folder: Path, report: ConversionReport) -> dict[str, str]:
        writer: SafetensorsWriter | BinWriter
        if self.to == "mamba_ssm":
            writer = BinWriter(folder, self.specs, self.aliases)
        else:
            writer = SafetensorsWriter(folder, self.specs, self.shard_size)
        by_target = {rule.target: rule for rule in self.rules}
        self.progress.stage("Writing weights", report.nbytes)
        try:
            for spec in writer.order:
                tensor = apply_rule(self.source, by_target[spec.name])
                finite = _all_finite(tensor)
                if not finite:
                    report.warnings.append(
                        f"the tensor {spec.name!r} has values that are not finite (NaN or infinite)."
                    )
                if tensor.dtype != spec.dtype:
                    tensor = tensor.to(spec.dtype)
                    if finite and not _all_finite(tensor):
                        raise ConversionError(
                            f"the tensor {spec.name!r} has values beyond the range of {spec.dtype}; take bfloat16 or float32."
                        )
                writer.write(tensor)
                del tensor
                self.progress.advance(spec.nbytes)
            writer.close()
        except BaseException:
            writer.abort()
            raise
        return dict(writer.checksums)


def _all_finite(tensor: Tensor) -> bool:
    # in blocks: a mask as long as the largest tensor would count against the memory promised. A sum is finite only if
    # everything in it is, and ten times as fast; it may overflow, though
    return all(bool(part.sum().isfinite() or part.isfinite().all()) for part in tensor.reshape(-1).split(BLOCK))


def _same_bytes(a: Tensor, b: Tensor, advance: Callable[[int], None]) -> bool:
    """Whether two tensors of one shape and dtype are equal bit by bit, NaN included."""
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    for left, right in zip(a.split(BLOCK), b.split(BLOCK), strict=True):
        if not torch.equal(left, right):
            return False
        advance(left.numel())
    return True


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise ConversionError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[str(dtype)]


def _check_arguments(
    to: str,
    dest: Path | None,
    max_shard_size: int | str | None,
    dry_run: bool,
    push_to_hub: str | None,
    private: bool,
) -> None:
    if to not in TARGETS:
        raise ConversionError(f"`to` must be one of {', '.join(TARGETS)}, got {to!r}.")
    if to == "mamba_ssm" and max_shard_size is not None:
        raise ConversionError("`max_shard_size` has no meaning with to='mamba_ssm': mamba_ssm loads a single file.")
    if dest is None and not dry_run:
        raise ConversionError("`dest` is missing: give the folder to be made, or ask for a dry run.")
    if to == "mamba_ssm" and push_to_hub is not None:
        raise ConversionError(
            "`push_to_hub` uploads safetensors only, and mamba_ssm's format is a pickle: convert to 'hf', or upload the folder "
            "yourself with `hf upload`."
        )
    if private and push_to_hub is None:
        raise ConversionError("`private` has a meaning only together with `push_to_hub`.")


def _command(source: str | Path, dest: str | Path | None, options: Mapping[str, str], **arguments: Any) -> str:
    """The command as it goes into the card: of paths of this machine the last part only."""
    words = ["hf-mamba", "convert", _name(source), *([] if dest is None else [_name(dest)])]
    if arguments.get("tokenizer") is not None:
        arguments["tokenizer"] = _name(arguments["tokenizer"])
    defaults = {"to": "hf"}
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value not in (None, False, defaults.get(name)):
            words += [flag, str(value)]
    for name, choice in options.items():
        words += ["--option", f"{name}={choice}"]
    return shlex.join(words)


def _name(place: str | Path) -> str:
    """A path without the folders that it lies in; an id on the Hub as it is."""
    path = Path(place).expanduser()
    return path.name if path.is_absolute() or path.exists() else str(place)
