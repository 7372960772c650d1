package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/leastrequest"
	_ "google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/credentials/insecure"

	pb "tonic-etcd.test/interop/helloworld"
)

// load is the load that a client makes. callers.rs documents the arguments.
type load struct {
	callers  int
	size     int
	warmUp   time.Duration
	duration time.Duration
	period   time.Duration
}

func parseLoad(args []string) (load, error) {
	var numbers [5]int
	if len(args) != len(numbers) {
		return load{}, fmt.Errorf("five numbers are required, not %d", len(args))
	}
	for index, arg := range args {
		number, err := strconv.Atoi(arg)
		if err != nil {
			return load{}, err
		}
		numbers[index] = number
	}
	return load{
		callers:  numbers[0],
		size:     numbers[1],
		warmUp:   time.Duration(numbers[2]) * time.Millisecond,
		duration: time.Duration(numbers[3]) * time.Millisecond,
		period:   time.Duration(numbers[4]) * time.Microsecond,
	}, nil
}

// client calls a service that etcd's own resolver finds. Its arguments are the address of etcd, the service, the policy, and the load.
func client(args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: client ETCD SERVICE POLICY LOAD...")
	}
	load, err := parseLoad(args[3:])
	if err != nil {
		return err
	}
	etcd, err := clientv3.NewFromURL("http://" + args[0])
	if err != nil {
		return err
	}
	builder, err := resolver.NewBuilder(etcd)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(
		"etcd:////gRPC/"+args[1],
		grpc.WithResolvers(builder),
		grpc.WithAuthority("peers"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig":[{%q:{}}]}`, args[2])),
	)
	if err != nil {
		return err
	}
	load.run(pb.NewGreeterClient(connection))
	return nil
}

// sample is what one caller counts while the load is measured.
type sample struct {
	calls, failed uint64
	// Microseconds.
	latencies []uint32
}

func (load load) run(client pb.GreeterClient) {
	var counting, stop atomic.Bool
	var callers sync.WaitGroup
	samples := make([]sample, load.callers)
	for index := range samples {
		callers.Go(func() { samples[index] = load.caller(index, client, &counting, &stop) })
	}
	time.Sleep(load.warmUp)
	fmt.Println("measuring")
	userBefore, systemBefore := cpu()
	counting.Store(true)
	time.Sleep(load.duration)
	counting.Store(false)
	user, system := cpu()
	user, system = user-userBefore, system-systemBefore
	stop.Store(true)
	callers.Wait()
	var total sample
	for _, sample := range samples {
		total.calls += sample.calls
		total.failed += sample.failed
		total.latencies = append(total.latencies, sample.latencies...)
	}
	slices.Sort(total.latencies)
	fmt.Println(total.calls, total.failed, user.Microseconds(), system.Microseconds(),
		total.percentile(0.5), total.percentile(0.99), total.percentile(0.999))
}

func (load load) caller(index int, client pb.GreeterClient, counting, stop *atomic.Bool) (counted sample) {
	name := strings.Repeat("x", load.size)
	var turns <-chan time.Time
	if load.period > 0 {
		// The first turns of the callers are spread over the period, as in callers.rs.
		time.Sleep(load.period * time.Duration(index) / time.Duration(load.callers))
		ticker := time.NewTicker(load.period)
		defer ticker.Stop()
		turns = ticker.C
	}
	for !stop.Load() {
		if turns != nil {
			<-turns
		}
		start := time.Now()
		_, err := client.SayHello(context.Background(), &pb.HelloRequest{Name: name})
		if !counting.Load() {
			continue
		}
		counted.calls++
		if err != nil {
			counted.failed++
		} else {
			counted.latencies = append(counted.latencies, uint32(time.Since(start).Microseconds()))
		}
	}
	return counted
}

func (sample sample) percentile(share float64) uint32 {
	if len(sample.latencies) == 0 {
		return 0
	}
	return sample.latencies[min(int(float64(len(sample.latencies))*share), len(sample.latencies)-1)]
}

// cpu returns the CPU time that the operating system accounts to this process: that of its own code, and that of the kernel on its behalf.
func cpu() (user, system time.Duration) {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		fail(err)
	}
	return time.Duration(usage.Utime.Nano()), time.Duration(usage.Stime.Nano())
}
