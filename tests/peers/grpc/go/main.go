// A gRPC server on grpc-go whose connections have an age: see ../server.py.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// Messages are plain bytes.
type plain struct{}

func (plain) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (plain) Unmarshal(data []byte, v any) error { *v.(*[]byte) = append([]byte(nil), data...); return nil }
func (plain) Name() string                       { return "plain" }

var (
	lock sync.Mutex
	seen = []string{}
)

func unary(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var request []byte
	if err := decode(&request); err != nil {
		return nil, err
	}
	lock.Lock()
	seen = append(seen, string(request))
	lock.Unlock()
	time.Sleep(20 * time.Millisecond)
	return &request, nil
}

func never(_ any, ctx context.Context, _ func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func watch(_ any, stream grpc.ServerStream) error {
	tick := []byte("tick")
	for {
		if err := stream.SendMsg(&tick); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func millis(text string) time.Duration {
	number, _ := strconv.Atoi(text)
	return time.Duration(number) * time.Millisecond
}

func main() {
	options := []grpc.ServerOption{grpc.ForceServerCodec(plain{})}
	if age := millis(os.Args[1]); age > 0 {
		limits := keepalive.ServerParameters{MaxConnectionAge: age, MaxConnectionAgeGrace: millis(os.Args[2])}
		options = append(options, grpc.KeepaliveParams(limits))
	}
	server := grpc.NewServer(options...)
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "age.Age",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Unary", Handler: unary}, {MethodName: "Never", Handler: never}},
		Streams:     []grpc.StreamDesc{{StreamName: "Watch", Handler: watch, ServerStreams: true}},
	}, struct{}{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go server.Serve(listener)
	fmt.Printf("{\"port\": %d}\n", listener.Addr().(*net.TCPAddr).Port)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		lock.Lock()
		text, _ := json.Marshal(map[string]any{"seen": seen})
		lock.Unlock()
		fmt.Println(string(text))
	}
}
