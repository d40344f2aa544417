// The test service on Node's http module, with the graceful stop of its documentation: server.close(). README.md describes its paths.
"use strict";

const fs = require("node:fs");
const http = require("node:http");

const record = process.env.RECORD || "/dev/null";

function events(response, count, every) {
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store" });
  let number = 0;
  const next = () => {
    if (number === count) return response.end();
    response.write(`id: ${number}\ndata: event ${number}\n\n`);
    number += 1;
    setTimeout(next, every);
  };
  next();
}

const server = http.createServer((request, response) => {
  const url = new URL(request.url, "http://peer.test");
  if (url.pathname === "/events") {
    return events(response, Number(url.searchParams.get("count")), Number(url.searchParams.get("every")));
  }
  let length = 0;
  request.on("data", (piece) => (length += piece.length));
  request.on("end", () => {
    if (request.headers["x-id"]) fs.appendFileSync(record, `${request.headers["x-id"]}\n`);
    const answer = url.pathname === "/upload" ? `${length}\n` : "ok\n";
    const finish = () => response.end(answer);
    response.setHeader("Content-Type", "text/plain");
    response.setHeader("Content-Length", answer.length);
    setTimeout(finish, Number(url.searchParams.get("ms") || 0));
  });
});

// Milliseconds; Node's own default is 5000.
if (process.env.KEEP_ALIVE) server.keepAliveTimeout = Number(process.env.KEEP_ALIVE);
server.listen(Number(process.env.PORT), "127.0.0.1");
process.on("SIGTERM", () => server.close(() => process.exit(0)));
