package cluster

import (
	"context"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
)

// TestDelayedQueryUsedAgain: a query that ends while held back queries are sent
// may be used for another that is held back at once: that waits, once.
func TestDelayedQueryUsedAgain(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	c := s.client
	ctx, cancel := context.WithCancel(t.Context())
	again := &outcome{}
	var g *group
	var replicas []block.NodeID
	s.loop.Post(func() {
		g = a.stream(0).group
		replicas, g.replicas, g.leader = g.replicas, nil, 0
		var second *query
		a.Read(ctx, 0, 0, 1, func(_ []payload.Piece, err error) {
			second.withdraw()
			second.finish(nil, nil, block.Errorf(block.Canceled, "ended by another"))
			a.Read(t.Context(), 0, 0, 1, func(_ []payload.Piece, err error) { again.done(err) })
			if len(c.delayed) != 1 || c.delayed[0] != second {
				t.Errorf("%d queries wait", len(c.delayed))
			}
		})
		a.Read(t.Context(), 0, 0, 1, func([]payload.Piece, error) {})
		second = c.delayed[1]
		cancel()
	})
	for range 5 {
		s.RunFor(tickEvery)
		if len(c.delayed) > 1 {
			t.Fatalf("%d queries wait, one was made", len(c.delayed))
		}
	}
	s.script = func(q asked) bool {
		answerBlocks(q, 20, filled(1))
		return true
	}
	s.loop.Post(func() { g.replicas = replicas })
	s.until("the read", func() bool { return again.ended })
	if again.err != nil {
		t.Error(again.err)
	}
	s.RunFor(time.Second)
	if len(c.delayed) != 0 {
		t.Errorf("%d queries wait at the end", len(c.delayed))
	}
}
