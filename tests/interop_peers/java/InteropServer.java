import io.grpc.ServerInterceptors;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.testing.integration.TestServiceImpl;
import java.io.File;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/** grpc-java's own interop test service on a loopback port, with the defaults of its server. */
final class InteropServer {
  private static final Set<String> OPTIONS =
      Set.of("port", "tls-cert", "tls-key", "max-age-ms", "max-metadata");

  /** The cases that TestServiceImpl does not support: of the fields about compression, it obeys that of unary responses. */
  private static final List<String> UNSUPPORTED =
      List.of(
          "cacheable_unary",
          "client_compressed_unary",
          "client_compressed_streaming",
          "server_compressed_streaming");

  public static void main(String[] args) throws Exception {
    Map<String, String> options = new HashMap<>();
    for (String arg : args) {
      if (arg.equals("--list-unsupported")) {
        UNSUPPORTED.forEach(System.out::println);
        return;
      }
      String[] parts = arg.split("=", 2);
      if (parts.length != 2 || !parts[0].startsWith("--") || !OPTIONS.contains(parts[0].substring(2))) {
        System.err.println("unknown option: " + arg);
        System.exit(2);
      }
      options.put(parts[0].substring(2), parts[1]);
    }

    int port = Integer.parseInt(options.getOrDefault("port", "0"));
    var address = new InetSocketAddress(InetAddress.getByName("127.0.0.1"), port);
    var builder = NettyServerBuilder.forAddress(address);
    if (options.containsKey("tls-cert")) {
      builder.useTransportSecurity(new File(options.get("tls-cert")), new File(options.get("tls-key")));
    }
    if (options.containsKey("max-age-ms")) {
      builder.maxConnectionAge(Long.parseLong(options.get("max-age-ms")), TimeUnit.MILLISECONDS);
    }
    if (options.containsKey("max-metadata")) {
      builder.maxInboundMetadataSize(Integer.parseInt(options.get("max-metadata")));
    }
    var timer = Executors.newSingleThreadScheduledExecutor();
    var service = new TestServiceImpl(timer);
    var server =
        builder
            .addService(ServerInterceptors.intercept(service, TestServiceImpl.interceptors()))
            .build()
            .start();
    System.out.println("listening on " + server.getPort());
    server.awaitTermination();
  }
}
