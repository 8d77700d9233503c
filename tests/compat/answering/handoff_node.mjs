// Answer a request with the script of a bundle for Node.   node handoff_node.mjs REQUEST ANSWER
//
// Every case names its bundle, whose modules lie in it; texts and pairs are what to ask.
import {readFile, writeFile} from 'node:fs/promises';
import path from 'node:path';
import {pathToFileURL} from 'node:url';

const [requestFile, answerFile] = process.argv.slice(2);
const answers = {};
for (const [name, {bundle, texts, pairs}] of Object.entries(JSON.parse(await readFile(requestFile, 'utf8')))) {
  const {load} = await import(pathToFileURL(path.join(bundle, 'predict.mjs')));
  const predictor = await load(undefined, {threads: 1});
  answers[name] = await predictor.predict(texts, pairs);
}
await writeFile(answerFile, JSON.stringify(answers));
