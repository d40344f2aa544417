package peer;

import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;

/** The test service as a servlet, for Tomcat and Jetty. tests/servers/README.md describes its paths. */
public final class App extends HttpServlet {
    private static final Path RECORD = Path.of(System.getenv().getOrDefault("RECORD", "/dev/null"));

    @Override
    protected void service(HttpServletRequest request, HttpServletResponse response) throws IOException {
        if (request.getRequestURI().equals("/events")) {
            events(response, number(request, "count"), number(request, "every"));
            return;
        }
        long length = length(request.getInputStream());
        String identity = request.getHeader("x-id");
        if (identity != null) {
            Files.writeString(RECORD, identity + "\n", StandardOpenOption.APPEND, StandardOpenOption.CREATE);
        }
        sleep(number(request, "ms"));
        byte[] answer = (request.getRequestURI().equals("/upload") ? length + "\n" : "ok\n").getBytes();
        response.setContentType("text/plain");
        response.setContentLength(answer.length);
        response.getOutputStream().write(answer);
    }

    private static void events(HttpServletResponse response, int count, int every) throws IOException {
        response.setContentType("text/event-stream");
        response.setHeader("Cache-Control", "no-store");
        for (int number = 0; number < count; number++) {
            response.getOutputStream().write(("id: " + number + "\ndata: event " + number + "\n\n").getBytes());
            response.flushBuffer();
            sleep(every);
        }
    }

    private static long length(InputStream body) throws IOException {
        byte[] piece = new byte[65536];
        long length = 0;
        for (int read = body.read(piece); read >= 0; read = body.read(piece)) {
            length += read;
        }
        return length;
    }

    /** From the query only: a form parser would read the body. */
    private static int number(HttpServletRequest request, String name) {
        String query = request.getQueryString() == null ? "" : request.getQueryString();
        for (String part : query.split("&")) {
            if (part.startsWith(name + "=")) {
                return Integer.parseInt(part.substring(name.length() + 1));
            }
        }
        return 0;
    }

    private static void sleep(int millis) {
        try {
            Thread.sleep(millis);
        } catch (InterruptedException stopped) {
            Thread.currentThread().interrupt();
        }
    }
}
