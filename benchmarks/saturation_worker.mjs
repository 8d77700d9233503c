// Run jobs in onnxruntime-web's WebAssembly, as saturation_worker.py does in ONNX Runtime.
//
//     node saturation_worker.mjs FOLDER JOBS.json        FOLDER: where `npm install onnxruntime-web` was run

import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';

const [folder, jobs] = process.argv.slice(2);
const ort = createRequire(path.resolve(folder) + '/')('onnxruntime-web');
ort.env.wasm.numThreads = 1;
const arrays = { int64: BigInt64Array, float32: Float32Array, uint8: Uint8Array };

const shapes = [];
for (const job of JSON.parse(fs.readFileSync(jobs, 'utf8'))) {
  const session = await ort.InferenceSession.create(job.graph, { executionProviders: ['wasm'], logSeverityLevel: 4 });
  const inputs = {};
  for (const [name, held] of Object.entries(job.inputs)) {
    if (!session.inputNames.includes(name)) continue;
    const bytes = fs.readFileSync(held.file);
    const values = new arrays[held.dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    inputs[name] = new ort.Tensor(held.dtype, values, held.shape);
  }
  const output = (await session.run(inputs))[session.outputNames[0]];
  fs.writeFileSync(job.output, Buffer.from(output.data.buffer, output.data.byteOffset, output.data.byteLength));
  shapes.push(output.dims);
  await session.release();
}
const versions = { 'onnxruntime-web': ort.env.versions.web, node: process.versions.node };
console.log(JSON.stringify({ machine: 'wasm', versions, shapes }));
