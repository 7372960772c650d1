package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	pb "tonic-etcd.test/interop/helloworld"
)

// greeter answers as the greeter of tests/interop.rs does.
type greeter struct {
	pb.UnimplementedGreeterServer
	name string
}

func (g *greeter) greet(name string) *pb.HelloReply {
	return &pb.HelloReply{Message: fmt.Sprintf("Hello %s, this is %s", name, g.name)}
}

func (g *greeter) SayHello(ctx context.Context, in *pb.HelloRequest) (*pb.HelloReply, error) {
	switch in.Name {
	case "metadata":
		sent, _ := metadata.FromIncomingContext(ctx)
		text := strings.Join(sent.Get("x-text"), ",")
		binary := strings.Join(sent.Get("x-data-bin"), ",")
		if err := grpc.SetHeader(ctx, metadata.Pairs("x-text", text, "x-data-bin", binary)); err != nil {
			return nil, err
		}
		if err := grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", text)); err != nil {
			return nil, err
		}
	case "details":
		failure := status.New(codes.InvalidArgument, "no such name: \u00fc%")
		failure, err := failure.WithDetails(&errdetails.BadRequest{
			FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "name", Description: "is details"}},
		})
		if err != nil {
			return nil, err
		}
		return nil, failure.Err()
	case "deadline":
		if _, ok := ctx.Deadline(); !ok {
			return nil, status.Error(codes.FailedPrecondition, "no deadline has arrived")
		}
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return g.greet(in.Name), nil
}

func (g *greeter) SayHellos(in *pb.HelloRequest, stream grpc.ServerStreamingServer[pb.HelloReply]) error {
	for range max(in.Replies, 1) {
		if err := stream.Send(g.greet(in.Name)); err != nil {
			return err
		}
	}
	return nil
}

func (g *greeter) GreetAll(stream grpc.ClientStreamingServer[pb.HelloRequest, pb.HelloReply]) error {
	var names []string
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(g.greet(strings.Join(names, ", ")))
		}
		if err != nil {
			return err
		}
		names = append(names, in.Name)
	}
}

func (g *greeter) Chat(stream grpc.BidiStreamingServer[pb.HelloRequest, pb.HelloReply]) error {
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(g.greet(in.Name)); err != nil {
			return err
		}
	}
}

// connections counts what was accepted: a client that is told to calm down comes back on a new one.
type connections struct{ accepted atomic.Int64 }

func (*connections) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (*connections) HandleRPC(context.Context, stats.RPCStats)                         {}
func (*connections) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (c *connections) HandleConn(_ context.Context, conn stats.ConnStats) {
	if _, ok := conn.(*stats.ConnBegin); ok {
		c.accepted.Add(1)
	}
}

// server serves with grpc-go's defaults, keep-alive enforcement included, registered with a lease that it
// keeps alive. On SIGTERM it takes its key away first.
func server(args []string) error {
	flags := flag.NewFlagSet("server", flag.ExitOnError)
	etcd := flags.String("etcd", "", "endpoints")
	service := flags.String("service", "", "target of the endpoint manager")
	name := flags.String("name", "", "what the greeter calls itself")
	certificate := flags.String("certificate", "", "PEM file, with the key beside it")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()

	counted := &connections{}
	options := []grpc.ServerOption{grpc.StatsHandler(counted)}
	if *certificate != "" {
		tls, err := credentials.NewServerTLSFromFile(*certificate, strings.TrimSuffix(*certificate, ".pem")+".key")
		if err != nil {
			return err
		}
		options = append(options, grpc.Creds(tls))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	serving := grpc.NewServer(options...)
	pb.RegisterGreeterServer(serving, &greeter{name: *name})
	failed := make(chan error, 1)
	go func() { failed <- serving.Serve(listener) }()

	client, err := connect(*etcd)
	if err != nil {
		return err
	}
	defer client.Close()
	manager, err := endpoints.NewManager(client, *service)
	if err != nil {
		return err
	}
	lease, err := client.Grant(ctx, 5)
	if err != nil {
		return err
	}
	renewed, err := client.KeepAlive(context.Background(), lease.ID)
	if err != nil {
		return err
	}
	go func() {
		for range renewed {
		}
	}()
	address := listener.Addr().String()
	key := *service + "/" + address
	if err := manager.AddEndpoint(ctx, key, endpoints.Endpoint{Addr: address}, clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	fmt.Println("serving", address)

	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	if err := manager.DeleteEndpoint(context.Background(), key); err != nil {
		return err
	}
	// Clients hear of it before they are sent away.
	time.Sleep(500 * time.Millisecond)
	serving.GracefulStop()
	fmt.Fprintln(os.Stdout, "accepted", counted.accepted.Load())
	return nil
}

// serve prints the address of a server that is not registered, and serves until the process receives SIGTERM.
func serve(serving *grpc.Server) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- serving.Serve(listener) }()
	fmt.Println("serving", listener.Addr())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		serving.GracefulStop()
		return nil
	}
}
