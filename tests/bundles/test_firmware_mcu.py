"""The kind `firmware` for microcontrollers: graphs that are taken, C that computes what ONNX Runtime does, images that are refused."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgebuild import bundle, sandbox, signing
from edgebuild.backend import ModelFacts
from edgebuild.backends import onnxruntime
from edgebuild.bundles import BUNDLES, dense, firmware, firmware_mcu, pkcs11, programs
from edgebuild.errors import StepFailed
from edgebuild.render import Word
from edgebuild.signing import Pair
from edgebuild.step import Action
from tests import tokens
from tests.bundles.packing import GOLDEN, ROOT, action, as_text, files, own_pair, report, require, self_tested

MODEL, DATA = ROOT / "targets" / "models" / "digits-mlp.onnx", ROOT / "targets" / "data" / "digits-eval.npz"
PLATFORM = yaml.safe_load((ROOT / "edgebuild" / "platforms" / "cortex-m.yaml").read_text())
DEVICE: Mapping[str, Any] = PLATFORM["facts"]
COMMON = {"name": Word("mcu-digits"), "version": "1.2.3", "platform": Word("cortex-m")}
TOOLS = (firmware_mcu.HOST, sandbox.PROGRAM)


@pytest.fixture(autouse=True)
def tools(request: pytest.FixtureRequest) -> None:
    wanted = firmware_mcu.TOOLS if request.node.get_closest_marker("platform") else TOOLS
    require({name: firmware_mcu.TOOLS[name] for name in wanted})


def packing(place: Path, **changes: Any) -> Action:
    """The package step of digits-mlp.onnx for the platform cortex-m, or of the model that lies there."""
    if not (place / "artifact").exists():
        (place / "artifact").mkdir(parents=True)
        shutil.copyfile(MODEL, place / "artifact" / "model.onnx")
    platform = {"name": "cortex-m", "description": PLATFORM["description"], "facts": {**DEVICE, **changes.pop("facts", {})}}
    given = {"name": "mcu-digits", "scheme": "none", "platform": platform, **changes}
    return action("firmware", place / "artifact", place / "out", **given)


def pack(place: Path, **changes: Any) -> Path:
    made = packing(place, **changes)
    bundle.run(made, "onnxruntime", onnxruntime, BUNDLES["firmware"])
    return made.outputs["bundle"]


def pack_exact(place: Path) -> Path:
    """Of a model that takes two of its four inputs, times four: every processor computes the same bits of it."""
    (place / "artifact").mkdir(parents=True)
    exact = {"w1": 2 * np.eye(4, dtype=np.float32), "w2": 2 * np.eye(4, 2, dtype=np.float32), "b1": np.zeros(4, np.float32)}
    model(place / "artifact" / "model.onnx", TAKEN["relu"][0], constants={**CONSTANTS, **exact, "b2": np.zeros(2, np.float32)})
    return pack(place)


# -- graphs -----------------------------------------------------------------------------------------------------------------
SEED = np.random.default_rng(7)
W1, W2 = (SEED.normal(size=size).astype(np.float32) for size in ((4, 3), (3, 2)))
B1, B2 = (SEED.normal(size=size).astype(np.float32) for size in (3, 2))
CONSTANTS = {
    "w1": W1,
    "w2": W2,
    "b1": B1,
    "b2": B2,
    "w1t": W1.T.copy(),
    "row": B1[None],
    "one": np.ones(1, np.float32),
    "column": B1[:, None],
}
Node = tuple[str, Sequence[str], str, Mapping[str, Any]]
LAST: Node = ("Gemm", ("h", "w2", "b2"), "y", {})


def model(
    path: Path,
    nodes: Sequence[Node],
    shape: Sequence[Any] = ("N", 4),
    dtype: int = TensorProto.FLOAT,
    more: str = "",
    constants: Mapping[str, NDArray[np.float32]] = CONSTANTS,
) -> Path:
    """A graph x → y of these nodes (operator, inputs, output, attributes) over constants."""
    found = [helper.make_node(kind, list(inputs), [output], **attributes) for kind, inputs, output, attributes in nodes]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    inputs = [helper.make_tensor_value_info(name, dtype, list(shape)) for name in ("x", *([more] if more else []))]
    graph = helper.make_graph(found, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


TAKEN: dict[str, tuple[Sequence[Node], Sequence[Any]]] = {
    "relu": ((("Gemm", ("x", "w1", "b1"), "a", {}), ("Relu", ("a",), "h", {}), LAST), ("N", 4)),
    "sigmoid": ((("Gemm", ("x", "w1", "b1"), "a", {}), ("Sigmoid", ("a",), "h", {}), LAST), ("N", 4)),
    "tanh": ((("Gemm", ("x", "w1", "b1"), "a", {}), ("Tanh", ("a",), "h", {}), LAST), ("N", 4)),
    "softmax": (
        (("Gemm", ("x", "w1", "b1"), "h", {}), ("Gemm", ("h", "w2", "b2"), "z", {}), ("Softmax", ("z",), "y", {"axis": 1})),
        ("N", 4),
    ),
    "flattened": ((("Flatten", ("x",), "f", {}), ("Gemm", ("f", "w1", "b1"), "h", {}), LAST), ("N", 1, 2, 2)),
    "transposed": ((("Gemm", ("x", "w1t", "b1"), "h", {"transB": 1}), LAST), ("N", 4)),
    "scaled": ((("Gemm", ("x", "w1", "row"), "h", {"alpha": 0.5, "beta": 2.0}), LAST), ("N", 4)),
    "without biases": ((("Gemm", ("x", "w1"), "h", {}), LAST), ("N", 4)),
    "one bias": ((("Gemm", ("x", "w1", "one"), "h", {}), LAST), ("N", 4)),
    "products and sums": (
        (("MatMul", ("x", "w1"), "m", {}), ("Add", ("m", "b1"), "a", {}), ("Relu", ("a",), "h", {}), LAST),
        ("N", 4),
    ),
    "identity": ((("Gemm", ("x", "w1", "b1"), "i", {}), ("Identity", ("i",), "h", {}), LAST), ("N", 4)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_c_computes_what_onnx_runtime_does(name: str, tmp_path: Path) -> None:
    nodes, shape = TAKEN[name]
    path = model(tmp_path / "model.onnx", nodes, shape)
    inputs = SEED.normal(size=(8, *shape[1:])).astype(np.float32)
    expected = by_onnx_runtime(path, "x", inputs)
    found = by_c(dense.read(path), inputs.reshape(len(inputs), -1), tmp_path)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_every_size_are_the_same_in_c(tmp_path: Path) -> None:
    """emlearn's own six digits behind the point would make 3e-7 of 3.1e-7, and 0 of what is smaller."""
    weights = np.float32(10.0) ** SEED.uniform(-30, 30, size=(4, 3)).astype(np.float32)
    layers = [dense.Layer(weights=weights, biases=B1), dense.Layer(weights=W2, biases=B2)]
    text = dense.c_source(layers, "net")
    written = re.search(r"net_layer_0_weights\[12\] = \{ (.*?) \}", text)
    assert written
    found = [np.float32(one.removesuffix("f")) for one in written[1].split(", ")]
    assert np.array(found, np.float32).tobytes() == weights.tobytes()
    compile_c(text, tmp_path)


def by_onnx_runtime(path: Path, name: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.open(path.parent)
    try:
        return np.asarray(next(iter(session.infer({name: inputs}).values())))
    finally:
        session.close()


def test_numpy_warns_as_before() -> None:
    """emlearn would have it raise, in the frameworks of the same process too."""
    code = "import numpy; before = numpy.geterr(); from edgebuild.bundles import dense; dense.generator(); assert numpy.geterr() == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def compile_c(source: str, folder: Path, main: str = "int main(void) { return 0; }\n") -> Path:
    (folder / "net.c").write_text(source + main)
    words = ["gcc", "-std=c99", "-ffp-contract=off", f"-I{Path(dense.generator().__file__).parent}", "net.c", "-o", "net", "-lm"]
    subprocess.run(words, cwd=folder, check=True)
    return folder / "net"


def by_c(layers: Sequence[dense.Layer], inputs: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    outputs = layers[-1].weights.shape[1]
    main = f"""
#include <stdio.h>
{dense.c_array("given", inputs)}
int main(void)
{{
    float out[{outputs}];
    for (int row = 0; row < {len(inputs)}; row++) {{
        if (net_regress(given[row], {inputs.shape[1]}, out, {outputs}) != 0) return 1;
        for (int column = 0; column < {outputs}; column++) printf("%a ", out[column]);
        printf("\\n");
    }}
    return 0;
}}
"""
    done = subprocess.run([compile_c(dense.c_source(layers, "net"), folder, main)], capture_output=True, check=True, text=True)
    return np.array([[float.fromhex(word) for word in line.split()] for line in done.stdout.splitlines()], np.float32)


A: Node = ("Gemm", ("x", "w1", "b1"), "a", {})
REFUSED: dict[str, tuple[Sequence[Node], str, dict[str, Any]]] = {
    "another operator": ((A, ("Elu", ("a",), "h", {}), LAST), "has Elu h, which is none of that where it stands", {}),
    "two activations": ((A, ("Relu", ("a",), "r", {}), ("Tanh", ("r",), "h", {}), LAST), "has Tanh h, which is none", {}),
    "an activation first": ((("Relu", ("x",), "r", {}), ("Gemm", ("r", "w1", "b1"), "h", {}), LAST), "has Relu r", {}),
    "a branch": (
        (A, ("Relu", ("a",), "r", {}), ("Add", ("r", "a"), "h", {}), LAST),
        "has Add h, which is none of that where it stands",
        {},
    ),
    "beside the chain": (
        (A, ("Gemm", ("x", "w1", "b1"), "h", {}), LAST),
        "Gemm h does not take what the node before it made",
        {},
    ),
    "a matrix that is no constant": ((("Gemm", ("x", "z"), "h", {}), LAST), "with constant float32 matrices, and Gemm h", {}),
    "transposed input": ((("Gemm", ("x", "w1", "b1"), "h", {"transA": 1}), LAST), "with constant float32 matrices", {}),
    "a column added": (
        (("MatMul", ("x", "w1"), "m", {}), ("Add", ("m", "column"), "h", {}), LAST),
        "has Add h, which is none of that where it stands",
        {},
    ),
    "an operator of another's": (
        (("Gemm", ("x", "w1", "b1"), "a", {}), ("Relu", ("a",), "h", {"domain": "my"}), LAST),
        "has Relu h, which is none",
        {},
    ),
    "one layer": ((("Gemm", ("x", "w1", "b1"), "y", {}),), "at least 2 of them: this model has 1", {}),
    "sizes that do not fit": ((("Gemm", ("x", "w1", "b1"), "h", {}), LAST), "takes 4 values where 5 come", {"shape": ("N", 5)}),
    "free sizes": ((("Gemm", ("x", "w1", "b1"), "h", {}), LAST), "are not fixed beyond the first", {"shape": ("N", "M")}),
    "float64": ((("Gemm", ("x", "w1", "b1"), "h", {}), LAST), "x is of another type", {"dtype": TensorProto.DOUBLE}),
    "two inputs": (
        (("Gemm", ("x", "w1", "b1"), "h", {}), LAST),
        "one input and one output, and this model has 2 and 1",
        {"more": "u"},
    ),
    "softmax along the samples": (
        (("Gemm", ("x", "w1", "b1"), "a", {}), ("Softmax", ("a",), "h", {"axis": 0}), LAST),
        "has Softmax h",
        {},
    ),
    "an output in the middle": (
        (("Gemm", ("x", "w1", "b1"), "y", {}), ("Gemm", ("y", "w2"), "v", {})),
        "is not what its last node makes",
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_graphs_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    nodes, reason, given = REFUSED[name]
    with pytest.raises(StepFailed, match=reason) as caught:
        dense.read(model(tmp_path / "model.onnx", nodes, **given))
    assert str(caught.value).startswith("emlearn takes chains of Gemm and activations")


def test_what_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(StepFailed, match="onnx cannot read the model"):
        dense.read(tmp_path / "model.onnx")


CNN = {"Conv": 3, "Relu": 4, "Gemm": 2}


@pytest.mark.parametrize(
    ("framework", "scheme", "facts", "reason"),
    [
        ("onnxruntime", "none", ModelFacts(format="onnx", operators={"Gemm": 2, "Relu": 1}), ""),
        ("onnxruntime", "none", None, ""),
        ("onnxruntime", "none", ModelFacts(format="onnx", operators=CNN), "and this model has Conv×3$"),
        ("onnxruntime", "none", ModelFacts(format="onnx", operators={"Gemm": 1}), "of at least 2 layers, and this model has 1$"),
        ("onnxruntime", "none", ModelFacts(format="huggingface"), "as ONNX, and this model is huggingface"),
        ("onnxruntime", "int8", None, "quantize.scheme is int8; write quantize: {scheme: none}"),
        ("openvino", "none", None, "the framework is openvino; name framework: onnxruntime"),
    ],
)
def test_a_plan_refuses_what_facts_tell(framework: str, scheme: str, facts: ModelFacts | None, reason: str) -> None:
    found = firmware.unfit(DEVICE, framework, scheme, lambda: facts)
    assert re.search(reason, found) if reason else found == ""
    assert firmware.unfit({}, framework, scheme, lambda: facts) == ""  # a Linux device runs any of them


# -- the device -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"cpu": "cortex-a53"}, "facts.cpu: 'cortex-a53' is none of cortex-m3"),
        ({"cpu": "cortex-m3 -fplugin=x"}, "facts.cpu"),
        ({"slot": "65536"}, "facts.slot: '65536' is no address such as"),
        ({"slot": "0x10001"}, "a multiple of 512"),
        ({"slot_size": "0"}, "facts.slot_size"),
        ({"slot_size": "100B"}, "from 1 KiB to 4 GiB"),
        ({"ram": "x"}, "facts.ram"),
        ({"qemu": "mps2-an385,x=y"}, "facts.qemu"),
    ],
)
def test_facts_that_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(StepFailed, match=re.escape(message)):
        firmware_mcu.values({**COMMON, "facts": {**DEVICE, **facts}})


def test_versions_of_an_image() -> None:
    def version(text: str) -> str:
        return str(firmware_mcu.values({**COMMON, "version": text, "facts": {}})["image_version"])

    assert [version(text) for text in ("1.2.3", "1.2.3-rc.1+5", "255.255.65535")] == ["1.2.3", "1.2.3", "255.255.65535"]
    with pytest.raises(StepFailed, match=r"256\.0\.0 does not go into an MCUboot image"):
        version("256.0.0")


@pytest.mark.parametrize(("name", "run"), [("mcu-digits", "mcu_digits_run"), ("3d.net", "m3d_net_run"), ("int", "int_run")])
def test_the_name_of_the_function(name: str, run: str) -> None:
    assert firmware_mcu.values({**COMMON, "name": Word(name), "facts": {}})["run"] == run


# -- images, of which imgtool asks not what is in them ----------------------------------------------------------------------
def image(folder: Path, size: int = 4096, slot: int = 65536, pair: Pair | None = None) -> Path:
    """A signed image of zeros, and the public key beside it, as a bundle has them."""
    folder.mkdir(exist_ok=True)
    (folder / "body.bin").write_bytes(bytes(size))
    pair = pair or own_pair(firmware_mcu.TAKES)
    firmware_mcu.sign(pair, folder / "body.bin", folder, slot_size=slot, version="1.2.3")
    return folder


def test_an_image_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    one, other = image(tmp_path / "one"), image(tmp_path / "other")
    assert (one / firmware_mcu.IMAGE).read_bytes() == (other / firmware_mcu.IMAGE).read_bytes()
    assert firmware_mcu.verify_image(one) is None


@pytest.mark.parametrize("place", [20, 512, 3000, -40])
def test_one_flipped_byte_is_refused(place: int, tmp_path: Path) -> None:
    """In the header's version, at the program's begin, in it, and in the signature."""
    folder = image(tmp_path / "one")
    data = bytearray((folder / firmware_mcu.IMAGE).read_bytes())
    data[place] ^= 1
    (folder / firmware_mcu.IMAGE).write_bytes(data)
    with pytest.raises(StepFailed, match="imgtool verify"):
        firmware_mcu.verify_image(folder)


def test_another_key_is_refused(tmp_path: Path) -> None:
    folder = image(tmp_path / "one")
    firmware_mcu.imgtool(["keygen", "--type", "ed25519", "--key", str(tmp_path / "key.pem")], tmp_path)
    firmware_mcu.imgtool(
        ["getpub", "--key", str(tmp_path / "key.pem"), "--encoding", "pem", "--output", str(folder / firmware_mcu.PUBLIC)],
        tmp_path,
    )
    with pytest.raises(StepFailed, match="imgtool verify"):
        firmware_mcu.verify_image(folder)


def test_a_key_is_one_in_a_file_with_a_password_or_in_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What imgtool makes of it has the same bytes, as imgtool itself signs it; no copy of the key is left, and the PIN is told nobody."""
    require(pkcs11.BY_TOOL)
    pair, token = own_pair(firmware_mcu.TAKES), tokens.make(tmp_path / "hsm")
    token.take(1, Path(pair.key), "models")
    words = [
        "openssl",
        "pkey",
        "-in",
        pair.key,
        "-aes256",
        "-passout",
        f"pass:{tokens.PIN}",
        "-out",
        str(tmp_path / "locked.pem"),
    ]
    subprocess.run(words, check=True)
    for name, value in {**token.environment, "TOKEN_PIN": tokens.PIN}.items():
        monkeypatch.setenv(name, value)
    expected = image(tmp_path / "one")
    (tmp_path / "public.pem").write_bytes((expected / firmware_mcu.PUBLIC).read_bytes())
    said = tokens.listen(monkeypatch)
    for name, key in (("locked", str(tmp_path / "locked.pem")), ("token", token.uri("models"))):
        given = {"key": key, "cert": str(tmp_path / "public.pem"), "pin_env": "TOKEN_PIN"}
        made = image(tmp_path / name, pair=signing.named(given, firmware_mcu.TAKES))
        for file in (firmware_mcu.IMAGE, firmware_mcu.PUBLIC):
            assert (made / file).read_bytes() == (expected / file).read_bytes()
        assert not [path for path in files(made) if tokens.PIN.encode() in (data := path.read_bytes()) or b"PRIVATE" in data]
    assert tokens.PIN not in str(said)
    words = ["sign", "--key", pair.key, "--version", "1.2.3", "--header-size", "512", "--pad-header", "--align", "8"]
    firmware_mcu.imgtool([*words, "--slot-size", "65536", str(expected / "body.bin"), str(tmp_path / "imgtool.bin")], tmp_path)
    assert (tmp_path / "imgtool.bin").read_bytes() == (expected / firmware_mcu.IMAGE).read_bytes()
    other = Pair(key=token.uri("none"), certificate=tmp_path / "public.pem", pin="TOKEN_PIN")
    with pytest.raises(
        StepFailed, match=r"the token has no Ed25519 keys that are pkcs11:token=t;object=none; name one by object=LABEL"
    ):
        image(tmp_path / "none", pair=other)


def test_what_does_not_fit_into_the_slot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"imgtool sign: .*exceeds requested size"):
        image(tmp_path / "one", size=65000)


# -- whole bundles ----------------------------------------------------------------------------------------------------------
@pytest.mark.platform
def test_proven_on_the_emulated_board(tmp_path: Path) -> None:
    """And two builds give the same bytes, all of them."""
    one, other = pack(tmp_path / "one"), pack(tmp_path / "other")
    found = report(one)
    assert found["level"] == "L4"
    assert {"emlearn", "imgtool", "gcc", "arm-none-eabi-gcc", "qemu-system-arm", "runtime"} <= set(found["tools"])
    trees = [{path.relative_to(out): path.read_bytes() for path in files(out)} for out in (one, other)]
    assert trees[0] == trees[1]
    assert (one.parent / "archive").read_bytes() == (other.parent / "archive").read_bytes()


@pytest.mark.platform
@pytest.mark.parametrize(
    ("facts", "message"), [({"slot_size": "8KiB"}, "by facts.slot_size, 8,192 bytes"), ({"ram_size": "2KiB"}, "facts.ram_size")]
)
def test_a_device_that_is_too_small(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=rf"^the program takes \d+ bytes more than the device has .*{message}"):
        pack(tmp_path, facts=facts)


@pytest.mark.platform
def test_golden_folder(tmp_path: Path) -> None:
    """Meant to change? `python -m tests.bundles.rewrite`."""
    golden = GOLDEN / "firmware-mcuboot"
    expected = {path.relative_to(golden).as_posix(): path.read_bytes().decode() for path in files(golden)}
    assert as_text(pack_exact(tmp_path)) == expected


@pytest.mark.platform
def test_every_image_of_the_data_is_the_same_on_host_board_and_onnx_runtime(tmp_path: Path) -> None:
    """597 images: outputs within AGREES of the host's, which in turn are within the golden tolerance; all classes the same."""
    out = pack(tmp_path)
    with np.load(DATA) as data:
        pixels, labels = data["pixels"], data["labels"]
    logits = by_onnx_runtime(out / "model" / "model.onnx", "pixels", pixels)
    given = {"data": pixels.reshape(-1).tolist()}
    example = {
        "inputs": [given],
        "outputs": [{"data": logits.reshape(-1).tolist(), "stride": 1}],
        "tolerance": {"relative": 1e-3, "absolute": 1e-4},
    }
    (out / "src" / "golden.h").write_text(firmware_mcu._golden(example, 64, 10))
    values = firmware_mcu.values({**COMMON, "facts": DEVICE})
    rebuilt = firmware_mcu.build(out, own_pair(firmware_mcu.TAKES), values, tmp_path / "rebuilt")
    (tmp_path / "host").mkdir()
    here = firmware_mcu.on_host(out, tmp_path / "host")
    there = firmware_mcu.on_emulator(rebuilt, values, tmp_path / "host")
    assert here.shape == there.shape == (597, 10)
    assert firmware_mcu.difference(here, there) <= 1
    assert (here.argmax(axis=1) == logits.argmax(axis=1)).all()
    assert (there.argmax(axis=1) == logits.argmax(axis=1)).all()
    assert (there.argmax(axis=1) == labels).mean() > 0.96


@pytest.mark.platform
def test_a_program_that_computes_otherwise_fails(tmp_path: Path) -> None:
    """A weight changed in the C: the self-test says FAIL, on the host and on the board."""
    out = pack(tmp_path)
    source = out / "src" / "model.c"
    source.write_text(source.read_text().replace("weights[2048] = { ", "weights[2048] = { 9.0f + ", 1))
    values = firmware_mcu.values({**COMMON, "facts": DEVICE})
    rebuilt = firmware_mcu.build(out, own_pair(firmware_mcu.TAKES), values, tmp_path / "rebuilt")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(StepFailed, match="the self-test fails compiled for this machine: FAIL differs by"):
        firmware_mcu.on_host(out, tmp_path / "scratch")
    with pytest.raises(StepFailed, match="the self-test fails on an emulated mps2-an385: FAIL differs by"):
        firmware_mcu.on_emulator(rebuilt, values, tmp_path / "scratch")


@pytest.mark.platform
def test_the_evidence_that_the_board_prints(tmp_path: Path) -> None:
    out = pack(tmp_path, version="1.2.3-rc.1")
    (tmp_path / "host").mkdir()
    done = sandbox.run(["sh", str(out / "build.sh"), "host", str(tmp_path / "host")], scratch=tmp_path / "host", read=(out,))
    assert done.returncode == 0, done.stderr
    lines = subprocess.run([tmp_path / "host" / "selftest"], capture_output=True, check=True, text=True).stdout.splitlines()
    evidence = self_tested(lines[-1])
    assert (evidence["bundle"], evidence["version"], evidence["verdict"]) == ("mcu-digits", "1.2.3-rc.1", "PASS")
    (measured,) = evidence["measurements"]
    assert measured["name"] == "golden_error"
    assert 0 <= measured["value"] <= 1


@pytest.mark.platform
@pytest.mark.parametrize(("gone", "level"), [("qemu-system-arm", "L3"), ("gcc", "L2")])
def test_a_missing_tool_lowers_the_level(gone: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "absent", lambda names: [name for name in names if name == gone])
    found = report(pack(tmp_path))
    assert found["level"] == level
    assert f"{gone} is not installed: apt-get install {firmware_mcu.TOOLS[gone]}" in found["why_not_higher"]


def test_without_the_compiler_there_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "absent", lambda names: [name for name in names if name == "arm-none-eabi-gcc"])
    message = "arm-none-eabi-gcc is not installed: apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"
    with pytest.raises(StepFailed, match=message):
        pack(tmp_path)


def test_a_convolution_is_refused_when_packing(tmp_path: Path) -> None:
    """Where a plan could not know: before anything is compiled."""
    made = packing(tmp_path)
    shutil.copyfile(ROOT / "targets" / "models" / "digits.onnx", tmp_path / "artifact" / "model.onnx")
    with pytest.raises(StepFailed, match=r"emlearn takes chains of Gemm and activations .*, and this model has Conv"):
        bundle.run(made, "onnxruntime", onnxruntime, BUNDLES["firmware"])
