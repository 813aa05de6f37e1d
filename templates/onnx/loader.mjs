#!/usr/bin/env node
// Loads this bundle's model with ONNX Runtime. Run by Node.js it runs the golden example:
//
//     npm install onnxruntime-node && node loader.mjs
//     npm install onnxruntime-web && node loader.mjs onnxruntime-web
//
// It prints PASS or FAIL for each model file and, last, the evidence as one line of JSON; the exit status is 1 after a FAIL.
// On a web page import `load` and `worst` from here, and hand them the module onnxruntime-web.

const ARRAYS = {
  float32: Float32Array, float64: Float64Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
  bool: Uint8Array, float16: globalThis.Float16Array,
};

/** A session on one thread. `model`: a path, a URL, or the file's bytes. */
export function load(ort, model, options = {}) {
  return ort.InferenceSession.create(model, { intraOpNumThreads: 1, ...options });
}

/** An array of golden.json, { dtype, shape, data }, as a tensor. */
export function tensor(ort, { dtype, shape, data }) {
  const Kind = ARRAYS[dtype];
  if (!Kind) throw new Error(`this JavaScript engine has no arrays of ${dtype}`);
  const values = dtype.endsWith("int64") ? data.map(BigInt) : data.map(Number);
  return new ort.Tensor(dtype, Kind.from(values), shape);
}

/** The largest difference from the golden outputs, as a share of the tolerance: above 1 is a failure. */
export async function worst(ort, session, golden) {
  const feeds = Object.fromEntries(golden.inputs.map((one) => [one.name, tensor(ort, one)]));
  const found = await session.run(feeds);
  let share = 0;
  for (const { name, shape, stride, data } of golden.outputs) {
    const output = found[name];
    if (!output || String(output.dims) !== String(shape)) return Infinity;
    data.forEach((expected, index) => {
      const wanted = Number(expected);
      const allowed = golden.tolerance.absolute + golden.tolerance.relative * Math.abs(wanted);
      const difference = Math.abs(Number(output.data[index * stride]) - wanted) / allowed;
      share = difference <= share ? share : difference; // NaN, too, is a difference
    });
  }
  return share;
}

async function main(runtime, models) {
  const { readFile } = await import("node:fs/promises");
  const { createHash } = await import("node:crypto");
  const here = (name) => new URL(name, import.meta.url);
  const imported = await import(runtime);
  const ort = imported.default ?? imported;
  const web = runtime === "onnxruntime-web";
  if (web) ort.env.wasm.numThreads = 1;
  const text = await readFile(here("golden.json"));
  const golden = JSON.parse(text);
  const { name, version } = JSON.parse(await readFile(here("manifest.json")));
  const measurements = [];
  for (const model of models) {
    const options = { executionProviders: [web ? "wasm" : "cpu"] };
    const session = await load(ort, new Uint8Array(await readFile(here(model))), options);
    const share = await worst(ort, session, golden);
    console.log(share <= 1 ? "PASS" : "FAIL", model, `differs by ${share.toPrecision(3)} of the tolerance`);
    measurements.push({
      name: "golden_error",
      phase: "self-test",
      value: Number.isFinite(share) ? share : null,
      unit: "share of the tolerance",
      n: 1,
      data: createHash("sha256").update(text).digest("hex"),
      file: model,
      runtime: `${runtime} ${ort.env.versions?.common ?? ""}`.trim() + `, Node.js ${process.version}`,
      machine: `${process.platform} ${process.arch}`,
    });
  }
  const passed = measurements.every((one) => one.value !== null && one.value <= 1);
  console.log(JSON.stringify({ bundle: name, version, verdict: passed ? "PASS" : "FAIL", measurements }));
  return passed ? 0 : 1;
}

if (globalThis.process?.argv?.[1]?.endsWith("loader.mjs") && import.meta.url.endsWith("/loader.mjs")) {
  const models = process.argv.length > 3 ? process.argv.slice(3) : ["model.onnx", "model.ort"];
  process.exitCode = await main(process.argv[2] ?? "onnxruntime-node", models);
}
