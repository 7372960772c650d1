// The programs in Go that `make bench-peers` and `make bench-policies` start: the clients of grpc-go, and a control plane for tonic-xds.
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		fail(fmt.Errorf("usage: client|ads|policies ARGUMENT..."))
	}
	var err error
	switch mode, args := os.Args[1], os.Args[2:]; mode {
	case "client":
		err = client(args)
	case "ads":
		err = ads(args)
	case "policies":
		err = policies(args)
	default:
		err = fmt.Errorf("unknown mode %q", mode)
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
