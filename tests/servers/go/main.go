package main

import (
	"log"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	stopped := make(chan os.Signal, 1)
	signal.Notify(stopped, syscall.SIGTERM)
	serve := serveHTTP
	if len(os.Args) > 1 && os.Args[1] == "grpc" {
		serve = serveGRPC
	}
	if err := serve(stopped); err != nil {
		log.Fatal(err)
	}
}

func address() string { return "127.0.0.1:" + os.Getenv("PORT") }

// One write with O_APPEND: lines of several processes do not mix.
func record(id string) {
	path := os.Getenv("RECORD")
	if path == "" {
		return
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		log.Print(err)
		return
	}
	defer file.Close()
	file.WriteString(id + "\n")
}
