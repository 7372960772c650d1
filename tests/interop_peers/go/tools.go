//go:build tools

// Keeps the modules of the interop client in go.mod: scripts/setup-interop builds it from there.
package main

import _ "google.golang.org/grpc/interop/client"
