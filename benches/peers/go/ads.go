package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	manager "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	// The id of the client in its bootstrap configuration.
	node = "bench"
	// How long the first events of the watch are collected, so that the first snapshot has all servers.
	settling = 50 * time.Millisecond
)

// ads is a control plane for one service. It watches the same keys in etcd as the other clients, and prints its address.
// Its arguments are the address of etcd and the service.
func ads(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("usage: ads ETCD SERVICE")
	}
	etcd, err := clientv3.NewFromURL("http://" + args[0])
	if err != nil {
		return err
	}
	service := args[1]
	naming, err := endpoints.NewManager(etcd, "/gRPC/"+service)
	if err != nil {
		return err
	}
	updates, err := naming.NewWatchChannel(context.Background())
	if err != nil {
		return err
	}
	snapshots := cache.NewSnapshotCache(true, cache.IDHash{}, nil)
	go publish(snapshots, service, updates)

	plane := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(plane, server.NewServer(context.Background(), snapshots, nil))
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(socket.Addr())
	return plane.Serve(socket)
}

// publish makes a snapshot of each change of the keys.
func publish(snapshots cache.SnapshotCache, service string, updates endpoints.WatchChannel) {
	addresses := map[string]string{}
	settled := time.Now().Add(settling)
	for version := 1; ; version++ {
		apply(addresses, <-updates)
		for wait := time.Until(settled); wait > 0; wait = time.Until(settled) {
			select {
			case batch := <-updates:
				apply(addresses, batch)
			case <-time.After(wait):
			}
		}
		snapshot, err := describe(service, strconv.Itoa(version), slices.Sorted(maps.Values(addresses)))
		if err == nil {
			err = snapshots.SetSnapshot(context.Background(), node, snapshot)
		}
		if err != nil {
			fail(err)
		}
	}
}

func apply(addresses map[string]string, batch []*endpoints.Update) {
	for _, update := range batch {
		if update.Op == endpoints.Add {
			addresses[update.Key] = update.Endpoint.Addr
		} else {
			delete(addresses, update.Key)
		}
	}
}

// describe returns the resources of one service. Only the endpoints have a new version after each change.
func describe(service, version string, addresses []string) (*cache.Snapshot, error) {
	routes := &route.RouteConfiguration{
		Name: service,
		VirtualHosts: []*route.VirtualHost{{
			Name:    service,
			Domains: []string{"*"},
			Routes: []*route.Route{{
				Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
				Action: &route.Route_Route{Route: &route.RouteAction{
					ClusterSpecifier: &route.RouteAction_Cluster{Cluster: service},
				}},
			}},
		}},
	}
	routing, err := anypb.New(&router.Router{})
	if err != nil {
		return nil, err
	}
	connections, err := anypb.New(&manager.HttpConnectionManager{
		RouteSpecifier: &manager.HttpConnectionManager_Rds{Rds: &manager.Rds{
			RouteConfigName: service,
			ConfigSource:    aggregated(),
		}},
		HttpFilters: []*manager.HttpFilter{{
			Name:       "router",
			ConfigType: &manager.HttpFilter_TypedConfig{TypedConfig: routing},
		}},
	})
	if err != nil {
		return nil, err
	}
	snapshot, err := cache.NewSnapshot("1", map[resource.Type][]types.Resource{
		resource.ListenerType: {&listener.Listener{
			Name:        service,
			ApiListener: &listener.ApiListener{ApiListener: connections},
		}},
		resource.RouteType: {routes},
		resource.ClusterType: {&cluster.Cluster{
			Name:                 service,
			ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
			EdsClusterConfig:     &cluster.Cluster_EdsClusterConfig{EdsConfig: aggregated()},
			LbPolicy:             cluster.Cluster_ROUND_ROBIN,
		}},
	})
	if err != nil {
		return nil, err
	}
	snapshot.Resources[types.Endpoint] = cache.NewResources(version, []types.Resource{assignment(service, addresses)})
	return snapshot, nil
}

func aggregated() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:    core.ApiVersion_V3,
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
	}
}

func assignment(service string, addresses []string) *endpoint.ClusterLoadAssignment {
	var all []*endpoint.LbEndpoint
	for _, address := range addresses {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			fail(err)
		}
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			fail(err)
		}
		all = append(all, &endpoint.LbEndpoint{
			HealthStatus: core.HealthStatus_HEALTHY,
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
				Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
					Address:       host,
					PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(number)},
				}}},
			}},
		})
	}
	return &endpoint.ClusterLoadAssignment{
		ClusterName: service,
		Endpoints: []*endpoint.LocalityLbEndpoints{{
			Locality:            &core.Locality{Zone: "a"},
			LoadBalancingWeight: wrapperspb.UInt32(1),
			LbEndpoints:         all,
		}},
	}
}
