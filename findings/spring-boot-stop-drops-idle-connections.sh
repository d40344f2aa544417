#!/usr/bin/env bash
# Spring Boot 4.0.7 (Tomcat 11.0.22) with its default graceful shutdown: after SIGTERM its idle persistent connections stay open, and every
# request on one of them ends with FIN and no byte of a response. The request is not executed, and nothing announces the end, although a
# request that was under way is completed and answered. A client cannot tell this from a server that has executed the request and failed.
# Needs Java 17, Maven, python3. Exit code: 0 as described, 1 the behaviour has changed, 2 it could not be run.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -9 "$server" 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder"
mkdir -p src/main/java/app
cat >pom.xml <<'POM'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <parent>
    <groupId>org.springframework.boot</groupId>
    <artifactId>spring-boot-starter-parent</artifactId>
    <version>4.0.7</version>
    <relativePath/>
  </parent>
  <groupId>app</groupId>
  <artifactId>app</artifactId>
  <version>1</version>
  <properties><java.version>17</java.version></properties>
  <dependencies>
    <dependency><groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-web</artifactId></dependency>
  </dependencies>
  <build><plugins><plugin><groupId>org.springframework.boot</groupId><artifactId>spring-boot-maven-plugin</artifactId></plugin></plugins></build>
</project>
POM
cat >src/main/java/app/App.java <<'JAVA'
package app;

import java.util.concurrent.atomic.AtomicInteger;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RestController;

@SpringBootApplication
@RestController
public class App {
    private final AtomicInteger posts = new AtomicInteger();

    public static void main(String[] arguments) {
        SpringApplication.run(App.class, arguments);
    }

    @PostMapping("/post")
    String post() {
        System.out.println("executed POST " + posts.incrementAndGet());
        return "ok\n";
    }

    @GetMapping("/slow")
    String slow() throws InterruptedException {
        Thread.sleep(3000);
        return "ok\n";
    }
}
JAVA
mvn -B -q package >mvn.log 2>&1 || { tail -n 20 mvn.log; exit 2; }
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
java -jar target/app-1.jar --server.address=127.0.0.1 --server.port="$port" >server.log 2>&1 &
server=$!
for _ in $(seq 300); do grep -q 'Started App' server.log && break; kill -0 "$server" || exit 2; sleep 0.1; done
cat >client.py <<'PY'
import collections, os, signal, socket, sys, time

port, server = int(sys.argv[1]), int(sys.argv[2])
POST = b"POST /post HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi"


def response(connection):
    text = b""
    while not text.endswith(b"ok\n"):
        piece = connection.recv(4096)
        if not piece:
            return f"FIN after {len(text)} bytes"
        text += piece
    return text.split(b"\r\n")[0].decode().strip()


def connect():
    return socket.create_connection(("127.0.0.1", port), timeout=10)


idle = [connect() for _ in range(40)]
for connection in idle:
    connection.sendall(POST)
    response(connection)
busy = connect()
busy.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
time.sleep(0.3)
os.kill(server, signal.SIGTERM)
time.sleep(1)
try:
    connect()
    print("fresh connection: accepted")
except ConnectionRefusedError:
    print("fresh connection: refused")
seen = collections.Counter()
for connection in idle:
    connection.setblocking(False)
    try:
        connection.recv(1)
        seen["closed before the request"] += 1
        continue
    except BlockingIOError:
        connection.settimeout(10)
    connection.sendall(POST)
    seen[response(connection)] += 1
for text, count in seen.items():
    print(f"POST on an idle connection: {text}: {count} of {len(idle)}")
print("request under way:", response(busy))
PY
python3 client.py "$port" "$server" | tee seen
wait "$server" || true
server=
echo "POSTs executed before and after SIGTERM: $(grep -c 'executed POST' server.log)"
diff seen - <<'WANTED' && [ "$(grep -c 'executed POST' server.log)" = 40 ]
fresh connection: refused
POST on an idle connection: FIN after 0 bytes: 40 of 40
request under way: HTTP/1.1 200
WANTED
