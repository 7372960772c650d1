package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	pb "tonic-etcd.test/interop/helloworld"
)

const (
	// The time after the measurement in which the last calls end. A call that takes longer counts as failed.
	drain = 5 * time.Second
	// The message of a response, and of a failure, if the server had a disadvantage when it received the call.
	bad = "bad"
)

// policies makes the calls of `make bench-policies`. benches/policies/client.rs documents the arguments and the output.
func policies(args []string) error {
	if len(args) != 7 {
		return fmt.Errorf("usage: policies POLICY ADDRESSES CLIENTS EPOCH PERIOD WARM_UP TIME")
	}
	var numbers [5]int64
	for index, arg := range args[2:] {
		number, err := strconv.ParseInt(arg, 10, 64)
		if err != nil {
			return err
		}
		numbers[index] = number
	}
	var endpoints []resolver.Endpoint
	for _, address := range strings.Split(args[1], ",") {
		endpoints = append(endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	time.Sleep(time.Until(time.UnixMilli(numbers[1])))
	begin := time.Now()
	calls := callsOfClient{
		period: time.Duration(numbers[2]) * time.Microsecond,
		begin:  begin,
		from:   begin.Add(time.Duration(numbers[3]) * time.Millisecond),
		until:  begin.Add(time.Duration(numbers[3]+numbers[4]) * time.Millisecond),
	}
	samples := make([]policySample, numbers[0])
	var clients sync.WaitGroup
	for index := range samples {
		builder := manual.NewBuilderWithScheme("policies")
		builder.InitialState(resolver.State{Endpoints: endpoints})
		connection, err := grpc.NewClient(
			"policies:///",
			grpc.WithResolvers(builder),
			grpc.WithAuthority("policies"),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{%q:{}}]}`, args[0])),
		)
		if err != nil {
			return err
		}
		clients.Go(func() { calls.run(pb.NewGreeterClient(connection), &samples[index]) })
	}
	clients.Wait()
	var total policySample
	for index := range samples {
		total.calls += samples[index].calls
		total.bad += samples[index].bad
		total.failed += samples[index].failed
		total.latencies = append(total.latencies, samples[index].latencies...)
	}
	slices.Sort(total.latencies)
	latencies := sample{latencies: total.latencies}
	fmt.Println(total.calls, total.bad, total.failed,
		latencies.percentile(0.5), latencies.percentile(0.99), latencies.percentile(0.999))
	return nil
}

// callsOfClient has the times of the calls of one client. The period is 0 if a call starts when the previous call has ended.
type callsOfClient struct {
	period             time.Duration
	begin, from, until time.Time
}

// policySample is what one client counts.
type policySample struct {
	sync.Mutex
	calls, bad, failed int
	// Microseconds.
	latencies []uint32
}

func (calls callsOfClient) run(client pb.GreeterClient, sample *policySample) {
	if calls.period == 0 {
		for time.Now().Before(calls.until) {
			calls.one(client, sample)
		}
		return
	}
	random := func(mean time.Duration) time.Duration {
		return time.Duration(2 * rand.Float64() * float64(mean))
	}
	var running sync.WaitGroup
	for due := calls.begin.Add(random(calls.period / 2)); due.Before(calls.until); due = due.Add(random(calls.period)) {
		time.Sleep(time.Until(due))
		running.Go(func() { calls.one(client, sample) })
	}
	running.Wait()
}

// one makes one call, and counts it if it started in the measured time.
func (calls callsOfClient) one(client pb.GreeterClient, sample *policySample) {
	ctx, cancel := context.WithDeadline(context.Background(), calls.until.Add(drain))
	defer cancel()
	start := time.Now()
	reply, err := client.SayHello(ctx, &pb.HelloRequest{})
	took := time.Since(start)
	if start.Before(calls.from) {
		return
	}
	sample.Lock()
	defer sample.Unlock()
	sample.calls++
	if err != nil {
		sample.failed++
		if status.Convert(err).Message() == bad {
			sample.bad++
		}
		return
	}
	if reply.Message == bad {
		sample.bad++
	}
	sample.latencies = append(sample.latencies, uint32(took.Microseconds()))
}
