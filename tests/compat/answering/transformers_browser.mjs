// Answer a request with transformers.js in headless Chromium, everything served from this machine's loopback.
//   node transformers_browser.mjs REQUEST ANSWER CHROMIUM SCREENSHOT, run in the folder of its modules
import {createReadStream} from 'node:fs';
import {readFile, stat, writeFile} from 'node:fs/promises';
import {createServer} from 'node:http';
import {createRequire} from 'node:module';
import path from 'node:path';
import {fileURLToPath} from 'node:url';

const require = createRequire(path.resolve('package.json'));
const {chromium} = require('playwright-core');
const [requestFile, answerFile, executablePath, screenshot] = process.argv.slice(2);
const request = JSON.parse(await readFile(requestFile, 'utf8'));
const here = path.dirname(fileURLToPath(import.meta.url));

// What a URL's first folder stands for; nothing else on the disk is served.
const FOLDERS = {
  page: here,
  modules: path.resolve('node_modules'),
  models: path.dirname(Object.values(request)[0].folder),
};
const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.json': 'application/json',
  '.wasm': 'application/wasm',
};
// The browser itself refuses what is not served here, and the page reports it.
const POLICY = "default-src 'self' blob: data: 'unsafe-inline' 'wasm-unsafe-eval'";

async function serve(incoming, response) {
  const [, folder, ...rest] = decodeURIComponent(new URL(incoming.url, 'http://localhost').pathname).split('/');
  if (folder === 'request.json') {
    response.writeHead(200, {'content-type': TYPES['.json']}).end(JSON.stringify(request));
    return;
  }
  const file = path.join(FOLDERS[folder] ?? here, ...rest);
  const inside = folder in FOLDERS && file.startsWith(FOLDERS[folder] + path.sep);
  const found = inside ? await stat(file).catch(() => null) : null;
  if (!found?.isFile()) {
    response.writeHead(404).end();
    return;
  }
  const type = TYPES[path.extname(file)] ?? 'application/octet-stream';
  response.writeHead(200, {'content-type': type, 'content-length': found.size, 'content-security-policy': POLICY});
  createReadStream(file).pipe(response);
}

const server = createServer((incoming, response) => {
  serve(incoming, response).catch(() => response.destroy());
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
const origin = `http://127.0.0.1:${server.address().port}`;

const browser = await chromium.launch({
  executablePath,
  args: [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--no-first-run',
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
  ],
});
try {
  const page = await browser.newPage({viewport: {width: 1180, height: 800}});
  const requested = [];
  const said = [];
  page.on('request', (one) => requested.push(one.url()));
  page.on('console', (message) => said.push(`${message.type()}: ${message.text()}`));
  page.on('pageerror', (error) => said.push(`error: ${error.message}`));
  await page.goto(`${origin}/page/browser.html`);
  await page.waitForFunction(() => window.answered !== undefined, null, {timeout: 600_000});
  const {software, cases, refused} = await page.evaluate(() => window.answered);
  await page.screenshot({path: screenshot, fullPage: true});
  const local = (url) => ['blob:', 'data:', `${origin}/`].some((start) => url.startsWith(start));
  const foreign = requested.filter((url) => !local(url));
  await writeFile(
    answerFile,
    JSON.stringify({
      software: {...software, chromium: browser.version()},
      cases,
      requests: {all: requested.map((url) => url.replace(origin, '')), foreign, refused},
      said,
    }),
  );
} finally {
  await browser.close();
  server.close();
}
