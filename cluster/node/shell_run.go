package node

import (
	"context"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Run starts a node on its loop: Open, then Start. It blocks until the node
// listens; that its replicas are open is what Ready tells.
func Run(ctx context.Context, l *loop.System, cfg Config) (*Node, error) {
	cfg.Loop = l
	n, err := Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if !l.Call(func() { err = n.Start() }) {
		err = block.Errorf(block.Canceled, "node %d: its loop has stopped", cfg.ID)
	}
	if err != nil {
		return nil, err
	}
	return n, nil
}

// Shutdown stops a node in order and waits for it, until ctx ends: then the
// node may be left as a crash leaves it. The loop is the caller's to stop.
func Shutdown(ctx context.Context, l *loop.System, n *Node) error {
	stopped := make(chan error, 1)
	l.Post(func() { n.Stop(func(err error) { stopped <- err }) })
	select {
	case err := <-stopped:
		return err
	case <-ctx.Done():
		return block.Wrap(block.Canceled, ctx.Err(), "stop of node %d", n.ID())
	}
}

// Snapshot returns the node's status, from any goroutine but the loop's. It is
// false after the loop has stopped.
func Snapshot(l *loop.System, n *Node) (s Status, ok bool) {
	ok = l.Call(func() { s = n.Status() })
	return s, ok
}
