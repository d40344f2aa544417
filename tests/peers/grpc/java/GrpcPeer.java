import io.grpc.MethodDescriptor;
import io.grpc.ServerServiceDefinition;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.ServerCalls;
import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;

/** A gRPC server on grpc-java whose connections have an age: see ../server.py. */
public final class GrpcPeer {
    static final ConcurrentLinkedQueue<String> SEEN = new ConcurrentLinkedQueue<>();
    static final ScheduledExecutorService LATER = Executors.newScheduledThreadPool(2);

    static final MethodDescriptor.Marshaller<byte[]> PLAIN = new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] bytes) {
            return new ByteArrayInputStream(bytes);
        }

        @Override
        public byte[] parse(InputStream stream) {
            try {
                return stream.readAllBytes();
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    };

    static MethodDescriptor<byte[], byte[]> method(String name, MethodDescriptor.MethodType type) {
        return MethodDescriptor.newBuilder(PLAIN, PLAIN).setFullMethodName("age.Age/" + name).setType(type).build();
    }

    public static void main(String[] arguments) throws Exception {
        var service = ServerServiceDefinition.builder("age.Age")
            .addMethod(method("Unary", MethodDescriptor.MethodType.UNARY), ServerCalls.asyncUnaryCall((request, answer) -> {
                SEEN.add(new String(request, StandardCharsets.UTF_8));
                LATER.schedule(() -> {
                    answer.onNext(request);
                    answer.onCompleted();
                }, 20, TimeUnit.MILLISECONDS);
            }))
            .addMethod(method("Never", MethodDescriptor.MethodType.UNARY), ServerCalls.asyncUnaryCall((request, answer) -> { }))
            .addMethod(method("Watch", MethodDescriptor.MethodType.SERVER_STREAMING),
                ServerCalls.asyncServerStreamingCall((request, answer) -> {
                    var stream = (ServerCallStreamObserver<byte[]>) answer;
                    Runnable tick = () -> stream.onNext("tick".getBytes(StandardCharsets.UTF_8));
                    ScheduledFuture<?> ticks = LATER.scheduleAtFixedRate(tick, 0, 50, TimeUnit.MILLISECONDS);
                    stream.setOnCancelHandler(() -> ticks.cancel(false));
                }))
            .build();
        var builder = NettyServerBuilder.forAddress(new InetSocketAddress("127.0.0.1", 0)).addService(service);
        long age = Long.parseLong(arguments[0]);
        if (age > 0) {
            builder.maxConnectionAge(age, TimeUnit.MILLISECONDS);
            builder.maxConnectionAgeGrace(Long.parseLong(arguments[1]), TimeUnit.MILLISECONDS);
        }
        var server = builder.build().start();
        System.out.println("{\"port\": " + server.getPort() + "}");
        var lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        while (lines.readLine() != null) {
            System.out.println(SEEN.stream().collect(Collectors.joining("\",\"", "{\"seen\": [\"", "\"]}")));
        }
        System.exit(0);
    }
}
