package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/channelz/grpc_channelz_v1"
	"google.golang.org/grpc/credentials/insecure"
)

// channelz prints the channels, subchannels and sockets of a process, as grpc-go's client reads them.
func channelz(args []string) error {
	flags := flag.NewFlagSet("channelz", flag.ExitOnError)
	address := flags.String("address", "", "address of the process")
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
	client := grpc_channelz_v1.NewChannelzClient(connection)
	top, err := client.GetTopChannels(ctx, &grpc_channelz_v1.GetTopChannelsRequest{})
	if err != nil {
		return err
	}
	for _, listed := range top.Channel {
		answer, err := client.GetChannel(ctx, &grpc_channelz_v1.GetChannelRequest{ChannelId: listed.Ref.ChannelId})
		if err != nil {
			return err
		}
		printData("channel", answer.Channel.Data)
		for _, ref := range answer.Channel.SubchannelRef {
			if err := subchannel(ctx, client, ref.SubchannelId); err != nil {
				return err
			}
		}
	}
	fmt.Println("end", top.End)
	return nil
}

func subchannel(ctx context.Context, client grpc_channelz_v1.ChannelzClient, id int64) error {
	answer, err := client.GetSubchannel(ctx, &grpc_channelz_v1.GetSubchannelRequest{SubchannelId: id})
	if err != nil {
		return err
	}
	printData("subchannel", answer.Subchannel.Data)
	for _, ref := range answer.Subchannel.SocketRef {
		answer, err := client.GetSocket(ctx, &grpc_channelz_v1.GetSocketRequest{SocketId: ref.SocketId})
		if err != nil {
			return err
		}
		remote := answer.Socket.Remote.GetTcpipAddress()
		fmt.Println("socket", &net.TCPAddr{IP: remote.IpAddress, Port: int(remote.Port)})
	}
	return nil
}

func printData(kind string, data *grpc_channelz_v1.ChannelData) {
	fmt.Println(kind, data.Target, data.State.State, data.CallsStarted, data.CallsSucceeded, data.CallsFailed)
	for _, event := range data.Trace.GetEvents() {
		fmt.Println("event", event.Severity, event.Description)
	}
}
