package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

// Messages are plain bytes, so that the service needs no generated code.
type plainBytes struct{}

func (plainBytes) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (plainBytes) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}

func (plainBytes) Name() string { return "proto" }

// MAX_AGE and MAX_GRACE, in milliseconds, set the age after which the server ends a connection with GOAWAY.
func serveGRPC(stopped <-chan os.Signal) error {
	listener, err := net.Listen("tcp", address())
	if err != nil {
		return err
	}
	age := keepalive.ServerParameters{MaxConnectionAge: millis("MAX_AGE"), MaxConnectionAgeGrace: millis("MAX_GRACE")}
	server := grpc.NewServer(grpc.ForceServerCodec(plainBytes{}), grpc.KeepaliveParams(age))
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "peer.Peer",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Unary", Handler: unary}},
		Streams:     []grpc.StreamDesc{{StreamName: "Events", Handler: streamEvents, ServerStreams: true}},
	}, struct{}{})
	go func() {
		<-stopped
		server.GracefulStop()
	}()
	return server.Serve(listener)
}

func millis(variable string) time.Duration {
	value, _ := strconv.Atoi(os.Getenv(variable))
	return time.Duration(value) * time.Millisecond
}

func unary(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var request []byte
	if err := decode(&request); err != nil {
		return nil, err
	}
	if fields, _ := metadata.FromIncomingContext(ctx); len(fields.Get("x-id")) > 0 {
		record(fields.Get("x-id")[0])
	}
	value, _ := strconv.Atoi(string(request))
	time.Sleep(time.Duration(value) * time.Millisecond)
	return &request, nil
}

func streamEvents(_ any, stream grpc.ServerStream) error {
	var request []byte
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	var count, every int
	fmt.Sscan(string(request), &count, &every)
	for number := range count {
		event := fmt.Appendf(nil, "event %d", number)
		if err := stream.SendMsg(&event); err != nil {
			return err
		}
		time.Sleep(time.Duration(every) * time.Millisecond)
	}
	return nil
}
