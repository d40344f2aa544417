// Java: a client that uploads with java.net.http.HttpClient.
//   java EarlyAnswers.java URL BYTES COUNT
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.Map;
import java.util.TreeMap;
import java.util.stream.Collectors;

public class EarlyAnswers {
    public static void main(String[] args) throws Exception {
        byte[] body = new byte[Integer.parseInt(args[1])];
        Map<String, Integer> seen = new TreeMap<>();
        for (int n = 0; n < Integer.parseInt(args[2]); n++) {
            HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
            HttpRequest request = HttpRequest.newBuilder(URI.create(args[0]))
                .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
            String result;
            try {
                result = "" + client.send(request, HttpResponse.BodyHandlers.ofString()).statusCode();
            } catch (java.io.IOException error) {
                result = error.getClass().getSimpleName();
            }
            seen.merge(result, 1, Integer::sum);
        }
        System.out.println(seen.entrySet().stream()
            .map(entry -> "\"" + entry.getKey() + "\": " + entry.getValue())
            .collect(Collectors.joining(", ", "{", "}")));
    }
}
