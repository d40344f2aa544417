// Node: a server that responds 413 before it has read the body, or a client that uploads.
//   node early_answers.mjs server PORT
//   node early_answers.mjs fetch|http URL BYTES COUNT
import http from 'node:http';

const [mode, target, size, count] = process.argv.slice(2);

function upload(url, body) {
  return new Promise((resolve) => {
    const request = http.request(url, { method: 'POST', agent: false, headers: { 'content-length': body.length } });
    request.on('response', (response) => {
      response.resume();
      response.on('end', () => resolve(String(response.statusCode)));
      response.on('error', (error) => resolve(error.code ?? error.message));
    });
    request.on('error', (error) => resolve(error.code ?? error.message));
    request.end(body);
  });
}

async function fetched(url, body) {
  try {
    const response = await fetch(url, { method: 'POST', body });
    await response.arrayBuffer();
    return String(response.status);
  } catch (error) {
    return error.cause?.code ?? error.cause?.message ?? error.message;
  }
}

if (mode === 'server') {
  http.createServer((request, response) => {
    response.writeHead(413, { connection: 'close', 'content-length': 7 });
    response.end('too big');
  }).listen(Number(target), '127.0.0.1');
} else {
  const body = Buffer.alloc(Number(size), 'x');
  const seen = {};
  for (let n = 0; n < Number(count); n += 1) {
    const result = await (mode === 'fetch' ? fetched : upload)(target, body);
    seen[result] = (seen[result] ?? 0) + 1;
  }
  console.log(JSON.stringify(seen));
  process.exit(0);
}
