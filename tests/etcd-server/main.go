// The etcd server, as its Go module has it. scripts/build-etcd builds it in the version asked for.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
