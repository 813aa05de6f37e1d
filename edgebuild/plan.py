"""Target → steps, each with a recipe. Pure but for reading what its caller hands it: files' digests and versions.

The list `CODE` names, per verb, the modules whose text is in a recipe; a test holds it against the import graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgebuild import digest, ladder, original, reference
from edgebuild.backend import ModelFacts, Needs
from edgebuild.backends import BACKENDS
from edgebuild.bundles import BUNDLES, PARTICULAR, SIGNED, unfit
from edgebuild.errors import StepFailed, TargetError, WrongFact, did_you_mean, shown
from edgebuild.fit import Fit, Misfit, Wanted, choose
from edgebuild.render import check_values
from edgebuild.select import AUTO, Choice, Preferences
from edgebuild.signing import Pair, Takes, public
from edgebuild.source import Found, is_licence
from edgebuild.step import ENVIRONMENT, Step
from edgebuild.target import Target
from edgebuild.toolchain import Versions

_FORMATS = ("formats", "formats.gguf", "formats.onnx", "formats.safetensors")
# What every backend's action runs.
_MODEL = ("backend", "machine", "samples", "reference", "resources", "importance", "formats.gguf", "formats.safetensors", "units")
_QUALITY = ("quality", "language", "tensors", "answers", "intervals", "likeness", "onnxsource", *_MODEL)
CODE: dict[str, tuple[str, ...]] = {
    "fetch": ("source", "target", *_FORMATS),
    "assess": ("assess", "backend", "positions", *_FORMATS),
    "reference": ("original", "reference", "backend", "resources", "formats.safetensors", "units"),
    "convert": _MODEL,
    "quantize": _MODEL,
    "choose": ("ladder", "gates", "units"),
    "evaluate": _QUALITY,
    "answer": _QUALITY,
    "agree": ("agree", "likeness"),
    "benchmark": ("bench", "intervals", "meter", *_MODEL),
    "gate": ("gates", "units"),
    "package": ("bundle", "golden", "render", "signing", "token", "sandbox", "files", *_MODEL),
    "build": ("evidence", "units"),
}
READERS: dict[str, tuple[str, ...]] = {  # the modules that a backend shares, or is made of
    "mlx": ("backends.mlx_float32", "backends.mlx_weights", "positions"),
    "onnxruntime": ("onnxsource", "backends.onnxruntime_lm", "positions"),
    "openvino": ("onnxsource", "backends.openvino_ir", "backends.openvino_lm"),
    "olive": (
        "onnxsource",
        "formats.onnx",
        "backends.olive_text",
        "backends.olive_process",
        "backends.olive_workflow",
        "tether",
        "positions",
    ),
}
SELF_TEST = "selftest.py"  # of a framework, in a folder of templates
DOWNLOADS: dict[str, tuple[str, ...]] = {"hf": ("hub",), "https": ("download", "units")}  # what a fetch from elsewhere runs too


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a plan depends on beside its targets, found by `project`: versions, machine, code, files."""

    toolchain: Callable[[Needs], Versions]  # what a backend needs → the versions that it runs with
    isa: str
    machine: Mapping[str, str]
    code: Callable[[str], str]  # module → digest of its text
    source: Callable[[Target], Found]  # raises TargetError
    exists: Callable[[str], bool]  # is there a file at this path
    templates: Callable[[str], Mapping[str, str]]  # bundle kind → role → path of every template file
    preferences: Preferences
    facts: Callable[[Target, Found], ModelFacts | None]  # what a source that lies here is; None where that is not known
    signer: Callable[[Target, Takes], Pair]  # raises TargetError
    wheels: Callable[[str], str]  # the name of a lock → what a key holds of its wheels
    program: Callable[[str], str]  # a program of the system → digest of its file, empty where it is not installed


@dataclass(kw_only=True)
class Plan:
    """Steps by name, in the order in which they may run; the components of each recipe, by its digest.

    `problems` are the targets that cannot be built, with their messages; `groups` the files with a matrix, with their targets.
    """

    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    makers: list["Maker"] = field(default_factory=list)


def add(plan: Plan, target: Target, around: Surroundings, strict: bool) -> None:
    """Add a target's steps to the plan. Raises TargetError where it cannot be built, and then adds nothing."""
    source = around.source(target)
    for key, path in (("calibration.data", target.calibration), ("evaluate.data", target.evaluation)):
        if path and not around.exists(path):
            raise TargetError(
                [target.problem(key, f'there is no file "{shown(path)}"; paths are relative to the project\'s root')]
            )
    fit = _fit(target, source, around)
    target = replace(target, scheme=fit.scheme)
    make = Maker(plan, target, fit.choice, around, source.format)
    steps = _steps(make, source, fit.recipes, strict)
    if clash := sorted(step.name for step in steps if step.name in plan.steps):
        other = plan.steps[clash[0]].target
        raise TargetError([f"{target.file}: its step {clash[0]} is a step of the target {other} already; rename one of the two"])
    plan.steps.update((step.name, step) for step in steps)
    plan.makers.append(make)
    plan.targets[target.name] = {
        "description": target.description,
        "default": target.default,
        "memory": target.memory_limit,
        "estimates": dict(target.estimates),
        "time": target.time_limit,
        "fetch": {"url": source.url} if source.fetch else None,
        "sign": make.pair.to_json() if make.pair else None,
        "names_key": bool(target.sign),
    }


def _check_sign(target: Target) -> None:
    """Raises TargetError for a key that signs nothing; one that others of its file are signed with, by a matrix, may stand."""
    if not target.sign or not SIGNED.keys().isdisjoint({target.kind, *target.sign_kinds}):
        return
    said = target if "package.sign" in target.lines else target.platform
    message = f"a bundle of the kind {target.kind} is not signed; those of {' and '.join(SIGNED)} are"
    advice = "remove it; edgebuild release signs whatever is delivered, with a key of its own"
    raise TargetError([said.problem("package.sign", f"{message}; {advice}")])


def _check_facts(target: Target) -> None:
    """Raises TargetError where the platform says what the target's bundle cannot state."""
    try:
        BUNDLES[target.kind].stated(target.platform.facts)
        check_values({"facts": target.platform.facts})
    except WrongFact as error:
        raise TargetError([target.platform.problem(f"facts.{error.key}", f"{error.wrong}; correct it")]) from error
    except StepFailed as error:
        raise TargetError([target.platform.problem("facts", shown(str(error), 300))]) from error


def _fit(target: Target, source: Found, around: Surroundings) -> Fit:
    """The framework and what it quantizes how. The model is looked at only where that has a say in it."""
    for key, given in (("model.state", target.state), ("model.shape", target.shape)):
        if given and source.format != "onnx":
            message = f"is for ONNX models, whose inputs have names, but this one is {source.format}; remove it"
            raise TargetError([target.problem(key, message)])
    if target.kind not in BUNDLES:
        message = f'no bundle kind "{target.kind}"; there are: {", ".join(sorted(BUNDLES))}.{did_you_mean(target.kind, BUNDLES)}'
        raise TargetError([target.problem("package.kind", message)])
    _check_sign(target)
    _check_facts(target)
    bundle = BUNDLES[target.kind]

    def kind_refuses(framework: str) -> str:
        reason = bundle.refuse(framework, target.task)
        return f"{target.kind}: {reason}" if reason else ""

    def misfits(framework: str, scheme: str) -> str:
        reason = unfit(target.kind, target.platform.facts, framework, scheme, lambda: around.facts(target, source))
        return f"{target.platform.name}: {reason}" if reason else ""

    wanted = Wanted(
        framework=target.framework,
        task=target.task,
        format=source.format,
        facts=around.facts(target, source) if AUTO in (target.framework, target.scheme) else None,
        hardware=target.platform.hardware,
        prefer=target.prefer,
        scheme=target.scheme,
        quantize=target.quantize,
        written={key.split(".")[1] for key in target.lines if key.startswith("quantize.")} - {"scheme"},
        calibrated=bool(target.calibration),
        kind_refuses=kind_refuses,
        unfit=misfits,
        copies=bundle.COPIES.bundle,
        memory=target.platform.memory,
        weights=target.weights_limit,
    )
    try:
        return choose(wanted, around.preferences, BACKENDS)
    except Misfit as error:
        raise TargetError([target.problem(error.key, str(error))]) from error


class Maker:
    """Makes one target's steps: fills in recipes and paths."""

    def __init__(self, plan: Plan, target: Target, choice: Choice, around: Surroundings, format: str) -> None:
        self.target, self.choice, self.around, self.plan = target, choice, around, plan
        needs = BACKENDS[choice.framework].NEEDS[format]
        self.versions = around.toolchain(needs)
        self.toolchain = dict(self.versions(needs.packages))
        takes = SIGNED[target.kind].signs(target.platform.facts) if target.kind in SIGNED else None
        self.pair = around.signer(target, takes) if takes else None
        signing = takes.token if takes and self.pair and self.pair.in_token else {}
        self.programs = sorted({*BUNDLES[target.kind].TOOLS, *signing})  # that the bundle is made, signed and proven by
        self.state = {"state": dict(target.state)} if target.state else {}  # of what is run on samples

    def step(
        self,
        verb: str,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        params: Mapping[str, Any],
        after: tuple[str, ...],
        *,
        suffix: str = "",
        runs: bool = False,
        measures: bool = False,
        on_demand: bool = False,
        needs: Needs | None = None,
    ) -> Step:
        """`runs`: the step runs a framework, so versions, ISA and environment are in its recipe; `measures`: the machine too.

        `needs`: it runs another one than the target's.
        """
        name = self.target.name
        folder = f"build/{name}/{verb}{suffix}"
        return Step(
            name=f"{verb}:{name}{suffix}",
            verb=verb,
            target=name,
            recipe=self.recipe(verb, params, runs=runs, measures=measures, needs=needs),
            inputs=inputs,
            outputs={key: path if "/" in path else f"{folder}/{path}" for key, path in outputs.items()},
            after=after,
            on_demand=on_demand,
        )

    def recipe(
        self, verb: str, params: Mapping[str, Any], *, runs: bool = False, measures: bool = False, needs: Needs | None = None
    ) -> str:
        components: dict[str, Any] = {"verb": verb, "params": params}
        modules = list(CODE[verb])
        if verb == "package":
            modules += BUNDLES[self.target.kind].CODE
        if verb == "fetch" and params:
            modules += DOWNLOADS["hf" if "repository" in params else "https"]
        if runs:
            modules += [f"backends.{self.choice.framework}", *READERS.get(self.choice.framework, ())]
            components["backend"] = self.choice.framework
        if runs or needs:
            components["toolchain"] = dict(self.around.toolchain(needs)(needs.packages)) if needs else self.toolchain
            components["isa"] = self.around.isa
            components["environment"] = ENVIRONMENT
        if measures:
            components["machine"] = dict(self.around.machine)
        components["code"] = {module: self.around.code(module) for module in modules}
        recipe = digest.tagged("recipe", components)
        self.plan.recipes[recipe] = components
        return recipe


def _steps(make: Maker, source: Found, recipes: Mapping[str, Mapping[str, Any]], strict: bool) -> list[Step]:
    target, around, files = make.target, make.around, source.files
    task = {"task": target.task}
    fetch = _fetch(make, source)
    assess = make.step("assess", files, {"facts": "facts.json"}, {}, (fetch.name,))
    facts = assess.outputs["facts"]
    ran = _source_run(make, source, assess)
    convert = make.step(
        "convert",
        {**files, "facts": facts},
        {"model": "model", "report": "report.json"},
        {**task, **({"shape": {name: list(sizes) for name, sizes in target.shape.items()}} if target.shape else {})},
        (assess.name,),
        runs=True,
    )
    data = {"data": target.evaluation} if target.evaluation else {}
    known = {**files, **({"reference": ran.outputs["logits"]} if ran else {})}
    baseline = make.step(
        "evaluate",
        {"model": convert.outputs["model"], **data, "facts": facts, **{f"source/{role}": path for role, path in known.items()}},
        {"measurements": "measurements.json", "answers": "answers.safetensors", "held": "held.json"},
        {**task, "role": "baseline", **(make.state if data else {})},
        (convert.name, *([ran.name] if ran else [])),
        suffix=".baseline",
        runs=True,
    )
    candidate, rungs = convert, list[Step]()
    if "" in recipes:
        candidate = _quantize(make, convert, baseline, facts, recipes[""])
    elif recipes:
        candidate, rungs = _ladder(make, convert, facts, baseline, recipes)
    reports = {"report/convert": convert.outputs["report"], "report/held": baseline.outputs["held"]}
    if candidate is not convert:
        reports["report/quantize"] = candidate.outputs["report"]
    evaluate = _evaluate(make, candidate, baseline, "verdict" if rungs else "")
    timed = not target.platform.not_measured
    benchmark = make.step(
        "benchmark",
        {"model": candidate.outputs["model"], "baseline": convert.outputs["model"]},
        {"measurements": "measurements.json"},
        {**task, "not_measured": target.platform.not_measured, **({"profile": target.profile} if timed else {})},
        (candidate.name, convert.name),
        runs=True,
        measures=timed,
    )
    measured = {
        "measurements/baseline": baseline.outputs["measurements"],
        "measurements/evaluate": evaluate.outputs["measurements"],
        "measurements/benchmark": benchmark.outputs["measurements"],
    }
    gate = make.step(
        "gate",
        measured,
        {"verdicts": "verdicts.json"},
        {"gates": {metric: limit.to_json() for metric, limit in target.gates.items()}, "strict": strict},
        (evaluate.name, benchmark.name),
    )
    licences = {f"licence/{role.rsplit('/', 1)[-1]}": path for role, path in files.items() if _is_licence(role)}
    if "licences" in fetch.outputs:
        licences = {"licence/": fetch.outputs["licences"]}
    package = _package(make, candidate, facts, licences, (candidate.name, gate.name))
    steps = [fetch, assess, *([ran] if ran else []), convert, baseline, *([candidate] if candidate is not convert else [])]
    steps += [evaluate, benchmark, gate, package]
    evidence = make.step(
        "build",
        {
            **measured,
            **reports,
            "verdicts": gate.outputs["verdicts"],
            "facts": facts,
            **{f"made/{name}": path for name, path in package.outputs.items()},
            **{f"receipt/{step.stem}": step.receipt for step in steps},
        },
        {"evidence": f"build/{target.name}/evidence.json", "delivered": f"dist/{target.name}.evidence.json"},
        {
            "target": target.name,
            "version": target.version,
            "kind": target.kind,
            "source": target.source.partition("?")[0],  # what stands behind it in an address may be a token
            "platform": target.platform.name,
            "choice": make.choice.to_json(),
            "toolchain": make.toolchain,
            "isa": around.isa,
        },
        tuple(step.name for step in steps),
    )
    first = steps.index(baseline) + 1
    return [*steps[:first], *rungs, *steps[first:], evidence]


def _source_run(make: Maker, source: Found, assess: Step) -> Step | None:
    """The source run once by transformers: of a language model whose golden logits do not lie beside it, as far as is known here.

    Whatever framework asks first: of several targets of one model it is one piece of work.
    """
    if make.target.task != "text-generation" or source.format != "huggingface" or f"model/{reference.GOLDEN}" in source.files:
        return None
    logits = {"logits": "logits.safetensors"}
    return make.step("reference", source.files, logits, {}, (assess.name,), needs=original.NEEDS)


def _quantize(make: Maker, convert: Step, baseline: Step, facts: str, parameters: Mapping[str, Any], rung: str = "") -> Step:
    """One recipe; a `rung` of a ladder is on demand. Not before the conversion was held against its source."""
    target = make.target
    calibration = {"calibration": target.calibration} if target.calibration else {}
    return make.step(
        "quantize",
        {"model": convert.outputs["model"], "facts": facts, **calibration},
        {"model": "model", "report": "report.json"},
        {
            "task": target.task,
            "scheme": target.scheme,
            **parameters,
            "samples": target.calibration_samples if calibration else None,
            **(make.state if calibration else {}),
        },
        (convert.name, baseline.name),
        suffix=f".{rung}" if rung else "",
        runs=True,
        on_demand=bool(rung),
    )


def _evaluate(make: Maker, candidate: Step, baseline: Step, part: str, rung: str = "") -> Step:
    """A candidate held against the baseline: on all of the data, or on the part that is kept for choosing or for the verdict."""
    target = make.target
    data = {"data": target.evaluation} if target.evaluation else {}
    return make.step(
        "evaluate",
        {"model": candidate.outputs["model"], "baseline": baseline.outputs["answers"], **data},
        {"measurements": "measurements.json"},
        {
            "task": target.task,
            "role": "candidate",
            **({"part": part} if part else {}),
            **(make.state if data else {}),
        },
        (candidate.name, baseline.name),
        suffix=f".{rung}" if rung else "",
        runs=True,
        on_demand=bool(rung),
    )


def _ladder(
    make: Maker, convert: Step, facts: str, baseline: Step, recipes: Mapping[str, Mapping[str, Any]]
) -> tuple[Step, list[Step]]:
    """The step that chooses, and those that it runs on demand. Its key holds their recipes, so all that its walk depends on."""
    target, rungs, steps = make.target, {}, []
    for rung, parameters in recipes.items():
        quantize = _quantize(make, convert, baseline, facts, parameters, rung)
        evaluate = _evaluate(make, quantize, baseline, "choosing", rung)
        steps += [quantize, evaluate]
        suits = BACKENDS[make.choice.framework].LADDER[rung]
        rungs[rung] = {
            "operators": sorted(suits.operators),
            "convolutions": suits.convolutions,
            "quantize": quantize.recipe,
            "evaluate": evaluate.recipe,
        }
    data = {"data": target.evaluation} if target.evaluation else {}
    gates = ladder.limits({metric: limit.to_json() for metric, limit in target.gates.items()})
    chosen = make.step(
        "choose",
        {
            "model": convert.outputs["model"],
            "facts": facts,
            "baseline": baseline.outputs["answers"],
            "calibration": target.calibration,
            **data,
        },
        {"model": "model", "report": "report.json"},
        {"order": list(recipes), "rungs": rungs, "gates": gates},
        (convert.name, baseline.name),
    )
    return chosen, steps


def _fetch(make: Maker, source: Found) -> Step:
    """Lists what lies here; what comes from elsewhere it brings to the paths that the steps behind it read."""
    if not source.fetch:
        return make.step("fetch", source.files, {"source": "source.json"}, {}, ())
    outputs = {"source": "source.json", "model": next(iter(source.files.values()))}
    if "model/" in source.files:
        outputs["licences"] = "licences"
    return make.step("fetch", {}, outputs, source.fetch, ())


def _package(make: Maker, candidate: Step, facts: str, licences: Mapping[str, str], after: tuple[str, ...]) -> Step:
    target, device = make.target, make.target.platform.facts
    particular = PARTICULAR.get(target.kind)
    templates = dict(make.around.templates(target.kind))
    if shared := particular.shares(device) if particular else "":
        found = make.around.templates(shared).items()
        templates = {**{role: path for role, path in found if role.endswith(f"/{SELF_TEST}")}, **templates}
    outputs = {"bundle": f"dist/{target.name}", "report": "report.json"}
    if target.archive:
        outputs["archive"] = f"dist/{target.name}.tar"
    return make.step(
        "package",
        {"model": candidate.outputs["model"], "facts": facts, **templates, **licences},
        outputs,
        {
            "name": target.name,
            "description": target.description,
            "version": target.version,
            "task": target.task,
            "scheme": target.scheme,
            "kind": target.kind,
            "platform": {
                "name": target.platform.name,
                "description": target.platform.description,
                "facts": dict(target.platform.facts),
            },
            "limits": {"shell": target.shell_limit, "weights": target.weights_limit},
            "require_level": target.require_level,
            **_proof(make),
        },
        after,
        runs=True,
        needs=particular.needs(device) if particular else None,
    )


def _proof(make: Maker) -> dict[str, Any]:
    """What says how a bundle is signed and how far it can be proven here: the public half of a key alone, and programs' digests.

    And the lock of what an image is made of.
    """
    around = make.around
    programs = {name: around.program(name) for name in make.programs}
    lock = BUNDLES[make.target.kind].LOCKS.get(make.choice.framework)
    wheels = {"wheels": around.wheels(lock)} if lock else {}
    signed = {"sign": {"public": public(make.pair), "test": make.pair.test}} if make.pair else {}
    return {**({"programs": programs} if programs else {}), **wheels, **signed}


def _is_licence(role: str) -> bool:
    return role.count("/") <= 1 and is_licence(role.rsplit("/", 1)[-1])
