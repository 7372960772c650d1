// The Go side of the interop tests: servers that register with etcd's naming package, and clients that
// find their servers with its resolver. tests/interop.rs drives it.
package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

func main() {
	modes := map[string]func(args []string) error{
		"version":        version,
		"certificates":   certificates,
		"server":         server,
		"load":           load,
		"check":          check,
		"list":           list,
		"golden":         golden,
		"channelz":       channelz,
		"limited-server": limitedServer,
		"orca-server":    orcaServer,
		"overload":       overload,
		"orca-client":    orcaClient,
		"orca-balance":   orcaBalance,
		"service-config": serviceConfig,
	}
	if len(os.Args) < 2 || modes[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: peer MODE [FLAGS]")
		os.Exit(2)
	}
	if err := modes[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// version names what is being tried.
func version([]string) error {
	fmt.Println("grpc-go", grpc.Version)
	return nil
}

func connect(endpoints string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   strings.Split(endpoints, ","),
		DialTimeout: 10 * time.Second,
	})
}
