// A service between others, as users write them with net/http: it asks the next service and answers in its words, or, where
// there is none, works for a while. Its twin is service.py.
//
// Prints {"port": N} when it listens. Each line that it reads changes its settings, as in {"take_ms": 20}; it answers with
// all the calls that it has had, as one line of JSON. Ends when its standard input does.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

type settings struct {
	Next    string        `json:"next"`
	Forward string        `json:"forward"`
	Pause   time.Duration `json:"pause_ms"`
	Take    time.Duration `json:"take_ms"`
}

type call struct {
	Fields map[string]string `json:"fields"`
	Status int               `json:"status"`
	Left   bool              `json:"left"`
	Over   bool              `json:"over"`
	Millis float64           `json:"ms"`
}

type service struct {
	lock     sync.Mutex
	settings settings
	calls    []*call
	client   http.Client
}

var connectionLevel = []string{"Connection", "Content-Length", "Keep-Alive", "Te", "Transfer-Encoding"}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	service := &service{calls: []*call{}, client: http.Client{Timeout: 20 * time.Second}}
	go http.Serve(listener, service)
	fmt.Printf("{\"port\": %d}\n", listener.Addr().(*net.TCPAddr).Port)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println(service.change(lines.Bytes()))
	}
}

func (s *service) change(line []byte) string {
	s.lock.Lock()
	defer s.lock.Unlock()
	if err := json.Unmarshal(line, &s.settings); err != nil {
		panic(err)
	}
	calls, err := json.Marshal(s.calls)
	if err != nil {
		panic(err)
	}
	return string(calls)
}

func (s *service) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began, entry := time.Now(), &call{Fields: map[string]string{}}
	for name := range r.Header {
		entry.Fields[strings.ToLower(name)] = r.Header.Get(name)
	}
	s.lock.Lock()
	settings := s.settings
	s.calls = append(s.calls, entry)
	s.lock.Unlock()

	status, left := 0, false
	if settings.Next != "" {
		status = s.callOn(w, r, settings)
	} else {
		left = work(r, settings.Take*time.Millisecond)
		fmt.Fprint(w, "done")
	}

	s.lock.Lock()
	defer s.lock.Unlock()
	entry.Status, entry.Left, entry.Over = status, left, true
	entry.Millis = time.Since(began).Seconds() * 1000
}

// Does not look whether its own caller is still there (r.Context() would tell), as most do not.
func (s *service) callOn(w http.ResponseWriter, r *http.Request, settings settings) int {
	time.Sleep(settings.Pause * time.Millisecond)
	onward, err := http.NewRequest(http.MethodGet, "http://"+settings.Next+r.URL.Path, nil)
	if err != nil {
		panic(err)
	}
	onward.Header = passedOn(r.Header, settings.Forward)
	answer, err := s.client.Do(onward)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return http.StatusBadGateway
	}
	defer answer.Body.Close()
	w.Header().Set("Content-Type", answer.Header.Get("Content-Type"))
	w.WriteHeader(answer.StatusCode)
	io.Copy(w, answer.Body)
	return answer.StatusCode
}

// The fields of a call that go into the one that it causes.
func passedOn(fields http.Header, forward string) http.Header {
	switch forward {
	case "all":
		all := fields.Clone()
		for _, name := range connectionLevel {
			all.Del(name)
		}
		return all
	case "trace":
		return http.Header{"Traceparent": fields.Values("Traceparent")}
	default:
		return http.Header{}
	}
}

// Ends early, and returns true, where the caller has closed the connection.
func work(r *http.Request, takes time.Duration) bool {
	select {
	case <-time.After(takes):
		return false
	case <-r.Context().Done():
		return true
	}
}
