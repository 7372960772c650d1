package main

import (
	"encoding/json"
	"fmt"
	"os"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/leastrequest"
	_ "google.golang.org/grpc/balancer/randomsubsetting"
	_ "google.golang.org/grpc/balancer/ringhash"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// serviceConfig reads an array of service configs, each as a string, from the standard input. It prints a line for each: whether grpc-go's
// parser accepts it, and otherwise why not. The parser is used in both ways that grpc-go has: for the config that a program gives, and for
// the config that a resolver reports.
func serviceConfig([]string) error {
	var documents []string
	if err := json.NewDecoder(os.Stdin).Decode(&documents); err != nil {
		return err
	}
	insecure := grpc.WithTransportCredentials(insecure.NewCredentials())
	builder := manual.NewBuilderWithScheme("documents")
	builder.InitialState(resolver.State{})
	connection, err := grpc.NewClient("documents:///", insecure, grpc.WithResolvers(builder))
	if err != nil {
		return err
	}
	defer connection.Close()
	connection.Connect()
	for index, document := range documents {
		client, given := grpc.NewClient("passthrough:///unused", insecure, grpc.WithDefaultServiceConfig(document))
		if given == nil {
			client.Close()
		}
		reported := builder.CC().ParseServiceConfig(document).Err
		if (given == nil) != (reported == nil) {
			return fmt.Errorf("document %d: the program's config: %v, the resolver's: %v", index, given, reported)
		}
		if reported == nil {
			fmt.Println("accepted")
		} else {
			fmt.Printf("rejected: %q\n", reported.Error())
		}
	}
	return nil
}
