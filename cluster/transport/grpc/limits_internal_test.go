package grpc

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

type nobody struct{}

func (nobody) Receive(transport.Peer, transport.Message) {}
func (nobody) Closed(transport.Peer, error)              {}

// A stream without a hello ends, and a connection has few of them: whoever says
// nothing cannot gather goroutines and buffers here.
func TestStreamsWithoutHelloEnd(t *testing.T) {
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	n := New(Options{Loop: l})
	n.helloTime = 100 * time.Millisecond
	addr, stop, err := n.Listen(t.Context(), "127.0.0.1:0", nobody{})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var opened []grpc.ClientStream
	for range maxStreams {
		st, err := conn.NewStream(ctx, &streams[transport.Data], method(transport.Data))
		if err != nil {
			t.Fatal(err)
		}
		opened = append(opened, st)
	}
	// The next one is opened once one of these has ended.
	st, err := conn.NewStream(ctx, &streams[transport.Data], method(transport.Data))
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range append(opened, st) {
		if err := st.RecvMsg(&frame{}); status.Code(err) != codes.DeadlineExceeded || ctx.Err() != nil {
			t.Fatalf("a stream without a hello: %v", err)
		}
	}
}
