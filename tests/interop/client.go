package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "tonic-etcd.test/interop/helloworld"
)

// dial makes a client as the documentation of etcd's resolver does, with round robin.
func dial(args []string) (pb.GreeterClient, func(), error) {
	flags := flag.NewFlagSet("client", flag.ExitOnError)
	etcd := flags.String("etcd", "", "endpoints")
	target := flags.String("target", "", "etcd:///service")
	ca := flags.String("ca", "", "PEM file: speak TLS")
	authority := flags.String("authority", "", "in place of the target's")
	if err := flags.Parse(args); err != nil {
		return nil, nil, err
	}
	client, err := connect(*etcd)
	if err != nil {
		return nil, nil, err
	}
	builder, err := resolver.NewBuilder(client)
	if err != nil {
		return nil, nil, err
	}
	security := insecure.NewCredentials()
	if *ca != "" {
		if security, err = credentials.NewClientTLSFromFile(*ca, "greeter.test"); err != nil {
			return nil, nil, err
		}
	}
	options := []grpc.DialOption{
		grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(security),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
	}
	if *authority != "" {
		options = append(options, grpc.WithAuthority(*authority))
	}
	connection, err := grpc.NewClient(*target, options...)
	if err != nil {
		return nil, nil, err
	}
	end := func() {
		connection.Close()
		client.Close()
	}
	return pb.NewGreeterClient(connection), end, nil
}

// tally is what has come of the calls since the last report.
type tally struct {
	sync.Mutex
	Ok      int            `json:"ok"`
	Failed  int            `json:"failed"`
	Servers map[string]int `json:"servers"`
	Errors  map[string]int `json:"errors"`
}

func (t *tally) count(reply *pb.HelloReply, err error) {
	t.Lock()
	defer t.Unlock()
	if err != nil {
		t.Failed++
		t.Errors[err.Error()]++
		return
	}
	t.Ok++
	_, name, _ := strings.Cut(reply.Message, "this is ")
	t.Servers[name]++
}

// load calls all the time from a few callers, and reports and starts anew at each line of its input.
func load(args []string) error {
	client, end, err := dial(args)
	if err != nil {
		return err
	}
	defer end()
	now := &tally{Servers: map[string]int{}, Errors: map[string]int{}}
	for range 8 {
		go func() {
			for {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				now.count(client.SayHello(ctx, &pb.HelloRequest{Name: "load"}))
				cancel()
				time.Sleep(2 * time.Millisecond)
			}
		}()
	}
	input := bufio.NewScanner(os.Stdin)
	for input.Scan() {
		now.Lock()
		line, err := json.Marshal(now)
		now.Ok, now.Failed, now.Servers, now.Errors = 0, 0, map[string]int{}, map[string]int{}
		now.Unlock()
		if err != nil {
			return err
		}
		fmt.Println(string(line))
	}
	return nil
}

// check makes a call of each kind.
func check(args []string) error {
	client, end, err := dial(args)
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, step := range []struct {
		name string
		run  func(context.Context, pb.GreeterClient) error
	}{
		{"unary", unary}, {"server streaming", serverStreaming}, {"client streaming", clientStreaming},
		{"bidi", bidi}, {"metadata", metadataBothWays}, {"details", details}, {"deadline", deadline},
	} {
		if err := step.run(ctx, client); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Println("passed", step.name)
	}
	return nil
}

func unary(ctx context.Context, client pb.GreeterClient) error {
	reply, err := client.SayHello(ctx, &pb.HelloRequest{Name: "unary"}, grpc.WaitForReady(true))
	if err == nil && !strings.HasPrefix(reply.Message, "Hello unary, this is ") {
		err = fmt.Errorf("unexpected %q", reply.Message)
	}
	return err
}

func serverStreaming(ctx context.Context, client pb.GreeterClient) error {
	stream, err := client.SayHellos(ctx, &pb.HelloRequest{Name: "many", Replies: 1000})
	if err != nil {
		return err
	}
	for count := 0; ; count++ {
		_, err := stream.Recv()
		if errors.Is(err, io.EOF) && count == 1000 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("after %d: %w", count, err)
		}
	}
}

func clientStreaming(ctx context.Context, client pb.GreeterClient) error {
	stream, err := client.GreetAll(ctx)
	if err != nil {
		return err
	}
	for _, name := range []string{"a", "b", "c"} {
		if err := stream.Send(&pb.HelloRequest{Name: name}); err != nil {
			return err
		}
	}
	reply, err := stream.CloseAndRecv()
	if err == nil && !strings.HasPrefix(reply.Message, "Hello a, b, c, ") {
		err = fmt.Errorf("unexpected %q", reply.Message)
	}
	return err
}

func bidi(ctx context.Context, client pb.GreeterClient) error {
	stream, err := client.Chat(ctx)
	if err != nil {
		return err
	}
	for _, name := range []string{"a", "b", "c"} {
		if err := stream.Send(&pb.HelloRequest{Name: name}); err != nil {
			return err
		}
		reply, err := stream.Recv()
		if err != nil {
			return err
		}
		if !strings.HasPrefix(reply.Message, "Hello "+name) {
			return fmt.Errorf("unexpected %q", reply.Message)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("no end but %v", err)
	}
	return nil
}

func metadataBothWays(ctx context.Context, client pb.GreeterClient) error {
	ctx = metadata.AppendToOutgoingContext(ctx, "x-text", "some text", "x-data-bin", "\x00\xff")
	var header metadata.MD
	_, err := client.SayHello(ctx, &pb.HelloRequest{Name: "metadata"}, grpc.Header(&header))
	if err != nil {
		return err
	}
	got := []string{strings.Join(header.Get("x-text"), ","), strings.Join(header.Get("x-data-bin"), ",")}
	if got[0] != "some text" || got[1] != "\x00\xff" {
		return fmt.Errorf("unexpected %q", got)
	}
	return nil
}

func details(ctx context.Context, client pb.GreeterClient) error {
	_, err := client.SayHello(ctx, &pb.HelloRequest{Name: "details"})
	failure := status.Convert(err)
	if failure.Code() != codes.InvalidArgument || failure.Message() != "no such name: \u00fc%" || len(failure.Details()) != 1 {
		return fmt.Errorf("unexpected %v", err)
	}
	violation, ok := failure.Details()[0].(*errdetails.BadRequest)
	if !ok || violation.FieldViolations[0].Field != "name" {
		return fmt.Errorf("unexpected %v", failure.Details())
	}
	return nil
}

func deadline(ctx context.Context, client pb.GreeterClient) error {
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err := client.SayHello(ctx, &pb.HelloRequest{Name: "deadline"})
	// Both sides keep the time. A tonic server whose timer is first says so in words of its own, with another code.
	first := status.Code(err) == codes.Canceled && status.Convert(err).Message() == "Timeout expired"
	if status.Code(err) != codes.DeadlineExceeded && !first {
		return fmt.Errorf("unexpected %v", err)
	}
	return nil
}

// list prints what the endpoint manager reads.
func list(args []string) error {
	flags := flag.NewFlagSet("list", flag.ExitOnError)
	etcd := flags.String("etcd", "", "endpoints")
	service := flags.String("service", "", "target of the endpoint manager")
	if err := flags.Parse(args); err != nil {
		return err
	}
	client, err := connect(*etcd)
	if err != nil {
		return err
	}
	defer client.Close()
	manager, err := endpoints.NewManager(client, *service)
	if err != nil {
		return err
	}
	found, err := manager.List(context.Background())
	if err != nil {
		return err
	}
	line, err := json.Marshal(found)
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	return nil
}

// golden puts the values of tests/golden/etcd_naming.txt that this package can write.
func golden(args []string) error {
	client, err := connect(args[0])
	if err != nil {
		return err
	}
	defer client.Close()
	manager, err := endpoints.NewManager(client, "helloworld")
	if err != nil {
		return err
	}
	for key, endpoint := range map[string]endpoints.Endpoint{
		"helloworld/10.0.0.5:50051": {Addr: "10.0.0.5:50051"},
		"helloworld/node-7": {Addr: "[2001:db8::1]:50051", Metadata: map[string]any{
			"weight": 3, "zone": "eu-1a", "rack": "r1&r2", "canary": true,
		}},
		"helloworld/e1": {Addr: "greeter.example.org:443", Metadata: "blue"},
	} {
		if err := manager.AddEndpoint(context.Background(), key, endpoint); err != nil {
			return err
		}
	}
	return nil
}
