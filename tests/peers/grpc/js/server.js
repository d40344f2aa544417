// A gRPC server on grpc-js whose connections have an age: see ../server.py.
"use strict";
const grpc = require("@grpc/grpc-js");
const [age, grace] = process.argv.slice(2).map(Number);
const seen = [];
const plain = (bytes) => bytes;
const method = (name, responseStream) => ({
  path: `/age.Age/${name}`, requestStream: false, responseStream,
  requestSerialize: plain, requestDeserialize: plain, responseSerialize: plain, responseDeserialize: plain,
});
const limits = age ? { "grpc.max_connection_age_ms": age, "grpc.max_connection_age_grace_ms": grace } : {};
const server = new grpc.Server(limits);
server.addService({ Unary: method("Unary", false), Watch: method("Watch", true), Never: method("Never", false) }, {
  Unary(call, answer) {
    seen.push(call.request.toString());
    setTimeout(() => answer(null, call.request), 20);
  },
  Watch(call) {
    const ticks = setInterval(() => call.write(Buffer.from("tick")), 50);
    for (const end of ["cancelled", "error", "close"]) call.on(end, () => clearInterval(ticks));
  },
  Never() {},
});
server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.log(JSON.stringify({ port }));
});
const lines = require("readline").createInterface({ input: process.stdin });
lines.on("line", () => console.log(JSON.stringify({ seen })));
lines.on("close", () => process.exit());
