// grpc-go's own interop test service on a loopback port, with the defaults of its server.
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
)

// The cases that interop.NewTestServer does not support: it ignores the fields that ask for compression.
var unsupported = []string{
	"cacheable_unary",
	"client_compressed_unary",
	"client_compressed_streaming",
	"server_compressed_unary",
	"server_compressed_streaming",
}

func main() {
	port := flag.Int("port", 0, "loopback port, 0 for a free one")
	cert := flag.String("tls-cert", "", "certificate chain, PEM")
	key := flag.String("tls-key", "", "private key, PEM")
	maxAge := flag.Int("max-age-ms", 0, "MaxConnectionAge, 0 for none")
	maxMetadata := flag.Uint("max-metadata", 0, "MaxHeaderListSize in bytes, 0 for the default")
	list := flag.Bool("list-unsupported", false, "print the interop cases that this server does not support")
	flag.Parse()
	if *list {
		for _, name := range unsupported {
			fmt.Println(name)
		}
		return
	}

	var options []grpc.ServerOption
	if *cert != "" {
		tls, err := credentials.NewServerTLSFromFile(*cert, *key)
		if err != nil {
			log.Fatal(err)
		}
		options = append(options, grpc.Creds(tls))
	}
	if *maxAge > 0 {
		options = append(options, grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionAge: time.Duration(*maxAge) * time.Millisecond,
		}))
	}
	if *maxMetadata > 0 {
		options = append(options, grpc.MaxHeaderListSize(uint32(*maxMetadata)))
	}
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", *port))
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(options...)
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
	fmt.Printf("listening on %d\n", listener.Addr().(*net.TCPAddr).Port)
	log.Fatal(server.Serve(listener))
}
