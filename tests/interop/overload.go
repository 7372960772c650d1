package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	pb "tonic-etcd.test/interop/helloworld"
)

const pushbackHeader = "grpc-retry-pushback-ms"

// overloadReport is what the calls of an overload have come to.
type overloadReport struct {
	sync.Mutex
	Ok      int `json:"ok"`
	Refused int `json:"refused"`
	Failed  int `json:"failed"`
	// The other errors, and their numbers.
	Errors map[string]int `json:"errors"`
	// In milliseconds, of calls that succeeded at the first attempt.
	P99 float64 `json:"p99"`
	// Attempts that were refused with a pushback, and those that were refused without one.
	Pushbacks int `json:"pushbacks"`
	Without   int `json:"without"`
	// Attempts that followed a refusal, and those of them that did so before the time of the pushback.
	Retries int `json:"retries"`
	Early   int `json:"early"`
	// In milliseconds: the shortest and the longest pushback.
	Shortest  float64 `json:"shortest"`
	Longest   float64 `json:"longest"`
	latencies []float64
}

// attempts follows the attempts of one call, which are one after the other.
type attempts struct {
	report   *overloadReport
	number   int
	refused  time.Time
	pushback time.Duration
}

type attemptsKey struct{}

// attemptsHandler records the attempts that grpc-go makes for a call.
type attemptsHandler struct{}

func (attemptsHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (attemptsHandler) HandleConn(context.Context, stats.ConnStats)                       {}
func (attemptsHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }

func (attemptsHandler) HandleRPC(ctx context.Context, event stats.RPCStats) {
	call, ok := ctx.Value(attemptsKey{}).(*attempts)
	if !ok {
		return
	}
	call.report.Lock()
	defer call.report.Unlock()
	switch event := event.(type) {
	case *stats.Begin:
		call.number++
		if call.number > 1 {
			call.report.Retries++
			if event.BeginTime.Sub(call.refused) < call.pushback {
				call.report.Early++
			}
		}
	case *stats.End:
		values := event.Trailer.Get(pushbackHeader)
		if len(values) == 0 && status.Code(event.Error) != codes.ResourceExhausted {
			return
		}
		milliseconds, err := strconv.Atoi(strings.Join(values, ","))
		if err != nil {
			call.report.Without++
			return
		}
		pushback := float64(milliseconds)
		if call.report.Pushbacks == 0 || pushback < call.report.Shortest {
			call.report.Shortest = pushback
		}
		call.report.Longest = max(call.report.Longest, pushback)
		call.report.Pushbacks++
		call.refused, call.pushback = event.EndTime, time.Duration(milliseconds)*time.Millisecond
	}
}

func (r *overloadReport) call(client pb.GreeterClient, measured bool) {
	follow := &attempts{report: r}
	if !measured {
		follow.report = &overloadReport{}
	}
	ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), attemptsKey{}, follow), 5*time.Second)
	defer cancel()
	start := time.Now()
	_, err := client.SayHello(ctx, &pb.HelloRequest{Name: "overload"})
	latency := time.Since(start)
	if !measured {
		return
	}
	r.Lock()
	defer r.Unlock()
	switch status.Code(err) {
	case codes.OK:
		r.Ok++
		if follow.number == 1 {
			r.latencies = append(r.latencies, float64(latency)/float64(time.Millisecond))
		}
	case codes.ResourceExhausted:
		r.Refused++
	default:
		r.Failed++
		r.Errors[err.Error()]++
	}
}

// overload makes calls at a rate, over some connections with a retry policy, whether or not earlier calls have ended. It prints the outcome of
// those that start after the warm-up.
func overload(args []string) error {
	flags := flag.NewFlagSet("overload", flag.ExitOnError)
	address := flags.String("address", "", "address of the server")
	rate := flags.Int("rate", 200, "calls per second")
	warm := flags.Duration("warm", 5*time.Second, "warm-up")
	measured := flags.Duration("measured", 5*time.Second, "measured time")
	connections := flags.Int("connections", 4, "number of connections")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// Without the pushback, the second attempt would follow within a millisecond.
	config := `{"methodConfig":[{"name":[{}],"retryPolicy":{"maxAttempts":2,"initialBackoff":"0.001s","maxBackoff":"0.001s",` +
		`"backoffMultiplier":1,"retryableStatusCodes":["RESOURCE_EXHAUSTED"]}}]}`
	clients := make([]pb.GreeterClient, *connections)
	for i := range clients {
		connection, err := grpc.NewClient("passthrough:///"+*address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(config), grpc.WithStatsHandler(attemptsHandler{}))
		if err != nil {
			return err
		}
		defer connection.Close()
		clients[i] = pb.NewGreeterClient(connection)
	}
	report := &overloadReport{Errors: map[string]int{}}
	ticks := time.NewTicker(time.Second / time.Duration(*rate))
	defer ticks.Stop()
	var calls sync.WaitGroup
	begin := time.Now()
	for number := 0; time.Since(begin) < *warm+*measured; number++ {
		<-ticks.C
		client, late := clients[number%len(clients)], time.Since(begin) >= *warm
		calls.Add(1)
		go func() {
			defer calls.Done()
			report.call(client, late)
		}()
	}
	calls.Wait()
	if len(report.latencies) > 0 {
		sort.Float64s(report.latencies)
		report.P99 = report.latencies[len(report.latencies)*99/100]
	}
	line, err := json.Marshal(report)
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	return nil
}
