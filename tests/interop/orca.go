package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	orcaservice "github.com/cncf/xds/go/xds/service/orca/v3"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "tonic-etcd.test/interop/helloworld"
)

// reportingGreeter records a metric and a cost of each call.
type reportingGreeter struct{ greeter }

func (g *reportingGreeter) SayHello(ctx context.Context, in *pb.HelloRequest) (*pb.HelloReply, error) {
	recorder := orca.CallMetricsRecorderFromContext(ctx)
	recorder.SetRequestCost("rows", 12)
	recorder.SetNamedMetric("requests_in_flight", 5)
	return g.greeter.SayHello(ctx, in)
}

// orcaServer serves with grpc-go's load reports, without a registration.
func orcaServer([]string) error {
	recorder := orca.NewServerMetricsRecorder()
	recorder.SetApplicationUtilization(0.42)
	recorder.SetCPUUtilization(0.9)
	recorder.SetMemoryUtilization(0.3)
	recorder.SetQPS(17)
	recorder.SetEPS(3)
	recorder.SetNamedUtilization("pool", 0.5)
	serving := grpc.NewServer(orca.CallMetricsServerOption(recorder))
	pb.RegisterGreeterServer(serving, &reportingGreeter{greeter{name: "reporting"}})
	return serve(serving)
}

func printReport(source string, report *orcapb.OrcaLoadReport) {
	fmt.Println(source, report.ApplicationUtilization, report.NamedMetrics["requests_in_flight"], report.NamedMetrics["queue"],
		report.Utilization["pool"])
}

// orcaClient prints the report of a call, and the first two reports of the out-of-band service.
func orcaClient(args []string) error {
	flags := flag.NewFlagSet("orca-client", flag.ExitOnError)
	address := flags.String("address", "", "address of the server")
	if err := flags.Parse(args); err != nil {
		return err
	}
	connection, err := grpc.NewClient(*address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var trailer metadata.MD
	client := pb.NewGreeterClient(connection)
	if _, err := client.SayHello(ctx, &pb.HelloRequest{Name: "report"}, grpc.Trailer(&trailer)); err != nil {
		return err
	}
	values := trailer.Get("endpoint-load-metrics-bin")
	if len(values) != 1 {
		return fmt.Errorf("%d reports", len(values))
	}
	report := &orcapb.OrcaLoadReport{}
	if err := proto.Unmarshal([]byte(values[0]), report); err != nil {
		return err
	}
	printReport("call", report)
	request := &orcaservice.OrcaLoadReportRequest{ReportInterval: durationpb.New(200 * time.Millisecond)}
	stream, err := orcaservice.NewOpenRcaServiceClient(connection).StreamCoreMetrics(ctx, request)
	if err != nil {
		return err
	}
	for range 2 {
		report, err := stream.Recv()
		if err != nil {
			return err
		}
		printReport("stream", report)
	}
	return nil
}

// orcaBalance calls the servers with grpc-go's weighted round robin, until the first one has got a quarter as many calls as the second one, or
// until a timeout. It prints the shares of 100 calls.
func orcaBalance(args []string) error {
	flags := flag.NewFlagSet("orca-balance", flag.ExitOnError)
	addresses := flags.String("addresses", "", "of two servers with the names first and second")
	oob := flags.Bool("oob", false, "use the out-of-band service")
	if err := flags.Parse(args); err != nil {
		return err
	}
	builder := manual.NewBuilderWithScheme("orca")
	state := resolver.State{}
	for _, address := range strings.Split(*addresses, ",") {
		endpoint := resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}}
		state.Endpoints = append(state.Endpoints, endpoint)
	}
	builder.InitialState(state)
	config := fmt.Sprintf(`{"loadBalancingConfig":[{"weighted_round_robin":{"enableOobLoadReport":%v,"oobReportingPeriod":"0.1s",`+
		`"blackoutPeriod":"0s","weightUpdatePeriod":"0.1s"}}]}`, *oob)
	connection, err := grpc.NewClient("orca:///greeter", grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultServiceConfig(config))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	client := pb.NewGreeterClient(connection)
	for {
		now := &tally{Servers: map[string]int{}, Errors: map[string]int{}}
		for range 100 {
			now.count(client.SayHello(ctx, &pb.HelloRequest{Name: "balance"}, grpc.WaitForReady(true)))
		}
		first, second := now.Servers["first"], now.Servers["second"]
		if (first >= 15 && first <= 25 && first+second == 100) || ctx.Err() != nil {
			fmt.Println("first", first, "second", second)
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}
