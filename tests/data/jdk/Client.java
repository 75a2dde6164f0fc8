// The JDK's own client in its default version, which offers to go over to HTTP/2.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.util.stream.Stream;

public class Client {
    public static void main(String[] given) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        byte[] body = given[1].getBytes(StandardCharsets.UTF_8);
        for (String how : Stream.of("whole", "whole", "chunked").toList()) {
            var publisher = how.equals("whole")
                ? BodyPublishers.ofByteArray(body)
                : BodyPublishers.ofInputStream(() -> new java.io.ByteArrayInputStream(body));
            HttpRequest request = HttpRequest.newBuilder(URI.create(given[0]))
                .header("content-type", "application/json").POST(publisher).build();
            var answer = client.send(request, BodyHandlers.ofString());
            System.out.println(how + " " + answer.version() + " " + answer.statusCode());
        }
    }
}
