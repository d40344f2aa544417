package peer;

import org.eclipse.jetty.ee10.servlet.ServletContextHandler;
import org.eclipse.jetty.http2.server.HTTP2CServerConnectionFactory;
import org.eclipse.jetty.server.HttpConfiguration;
import org.eclipse.jetty.server.HttpConnectionFactory;
import org.eclipse.jetty.server.Server;
import org.eclipse.jetty.server.ServerConnector;
import org.eclipse.jetty.server.handler.GracefulHandler;

/** Jetty embedded, HTTP/1.1 and HTTP/2 by prior knowledge, with the graceful stop of its documentation. */
public final class Jetty {
    private static final int STOP_MILLIS = 30_000;

    public static void main(String[] arguments) throws Exception {
        Server server = new Server();
        HttpConfiguration http = new HttpConfiguration();
        ServerConnector connector =
                new ServerConnector(server, new HttpConnectionFactory(http), new HTTP2CServerConnectionFactory(http));
        connector.setHost("127.0.0.1");
        connector.setPort(Integer.parseInt(System.getenv("PORT")));
        server.addConnector(connector);
        ServletContextHandler context = new ServletContextHandler("/");
        context.addServlet(new App(), "/*");
        server.setHandler(new GracefulHandler(context));
        server.setStopTimeout(STOP_MILLIS);
        server.setStopAtShutdown(true);
        server.start();
        server.join();
    }
}
