// The test service on net/http: HTTP/1.1, and HTTP/2 by prior knowledge. tests/servers/README.md describes its paths.
package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"
)

func serveHTTP(stopped <-chan os.Signal) error {
	mux := http.NewServeMux()
	mux.HandleFunc("/events", sendEvents)
	mux.HandleFunc("/", answer)
	server := &http.Server{Addr: address(), Handler: mux, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	ended := make(chan error, 1)
	go func() {
		<-stopped
		ended <- server.Shutdown(context.Background())
	}()
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		return err
	}
	return <-ended
}

func answer(w http.ResponseWriter, r *http.Request) {
	length, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		return
	}
	if id := r.Header.Get("x-id"); id != "" {
		record(id)
	}
	millis, _ := strconv.Atoi(r.FormValue("ms"))
	time.Sleep(time.Duration(millis) * time.Millisecond)
	w.Header().Set("Content-Type", "text/plain")
	if r.URL.Path == "/upload" {
		fmt.Fprintf(w, "%d\n", length)
		return
	}
	fmt.Fprintln(w, "ok")
}

func sendEvents(w http.ResponseWriter, r *http.Request) {
	count, _ := strconv.Atoi(r.FormValue("count"))
	every, _ := strconv.Atoi(r.FormValue("every"))
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	for number := range count {
		fmt.Fprintf(w, "id: %d\ndata: event %d\n\n", number, number)
		http.NewResponseController(w).Flush()
		time.Sleep(time.Duration(every) * time.Millisecond)
	}
}
