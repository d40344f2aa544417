// Go: a server that responds 413 before it has read the body, or a client that uploads.
//
//	early-answers-go server PORT
//	early-answers-go client URL BYTES COUNT
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"syscall"
)

func upload(url string, body []byte) string {
	response, err := http.Post(url, "application/octet-stream", bytes.NewReader(body))
	if err != nil {
		var cause syscall.Errno
		errors.As(err, &cause)
		return "error: " + cause.Error()
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err.Error()
	}
	return strconv.Itoa(response.StatusCode)
}

func main() {
	if os.Args[1] == "server" {
		handler := func(writer http.ResponseWriter, _ *http.Request) { http.Error(writer, "too big", 413) }
		fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Args[2], http.HandlerFunc(handler)))
		os.Exit(1)
	}
	size, _ := strconv.Atoi(os.Args[3])
	count, _ := strconv.Atoi(os.Args[4])
	body, seen := bytes.Repeat([]byte("x"), size), map[string]int{}
	for range count {
		seen[upload(os.Args[2], body)]++
	}
	_ = json.NewEncoder(os.Stdout).Encode(seen)
}
