package main

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "tonic-etcd.test/interop/helloworld"
)

// limitedGreeter refuses calls with the name "refuse", and requests a wait.
type limitedGreeter struct{ greeter }

var (
	pushback = metadata.Pairs("grpc-retry-pushback-ms", "700")
	refusal  = status.Error(codes.ResourceExhausted, "the server is overloaded")
)

func (g *limitedGreeter) SayHello(ctx context.Context, in *pb.HelloRequest) (*pb.HelloReply, error) {
	if in.Name != "refuse" {
		return g.greeter.SayHello(ctx, in)
	}
	if err := grpc.SetTrailer(ctx, pushback); err != nil {
		return nil, err
	}
	return nil, refusal
}

// SayHellos refuses after the first message, so that the status is in trailers of their own.
func (g *limitedGreeter) SayHellos(in *pb.HelloRequest, stream grpc.ServerStreamingServer[pb.HelloReply]) error {
	if in.Name != "refuse" {
		return g.greeter.SayHellos(in, stream)
	}
	if err := stream.Send(g.greet(in.Name)); err != nil {
		return err
	}
	stream.SetTrailer(pushback)
	return refusal
}

// limitedServer serves without a registration.
func limitedServer([]string) error {
	serving := grpc.NewServer()
	pb.RegisterGreeterServer(serving, &limitedGreeter{greeter{name: "limited"}})
	return serve(serving)
}
