package nbd_test

import (
	"runtime"
	"testing"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/wire"
)

// TestRequestsAllocateNothing counts the allocations of the whole process, the
// client included, over many requests on a real socket. Under the race detector
// sync.Pool forgets at random, and the number means nothing.
func TestRequestsAllocateNothing(t *testing.T) {
	for _, c := range []struct {
		name string
		lend bool
		o    client.Options
		load client.Load
	}{
		{"lent/simple", true, client.Options{Simple: true}, client.Load{Depth: 32, Bytes: 4096}},
		{"lent/structured", true, client.Options{}, client.Load{Depth: 32, Bytes: 4096}},
		{"lent/one", true, client.Options{}, client.Load{Depth: 1, Bytes: 512}},
		{"workers/read", false, client.Options{}, client.Load{Depth: 32, Bytes: 4096}},
		{"workers/write", false, client.Options{}, client.Load{Depth: 32, Bytes: 4096, Write: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := blocktest.New(blocktest.Options{Name: "vol", Bytes: volBytes, NoLending: !c.lend})
			addr, s := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{})
			conn := dial(t, addr, c.o)
			load := c.load
			load.Span = volBytes
			fill := client.Load{Depth: 4, Bytes: 1 << 20, Span: volBytes, Write: true, Sequential: true}
			if err := fill.Run(conn, volBytes>>20); err != nil {
				t.Fatal(err)
			}
			// The first requests fill pools and start workers.
			if err := load.Run(conn, 2000); err != nil {
				t.Fatal(err)
			}
			const n = 20000
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			if err := load.Run(conn, n); err != nil {
				t.Fatal(err)
			}
			runtime.ReadMemStats(&after)
			// Starting the load costs some 3 per request in flight; a collection
			// empties pools.
			if per := float64(after.Mallocs-before.Mallocs) / n; per > 0.05 && !raceDetector {
				t.Errorf("%.3f allocations per request", per)
			}
			if hits := s.Stats().MemoryReads; c.lend && hits != 22000 || !c.lend && hits != 0 {
				t.Errorf("%d of 22000 reads from memory", hits)
			}
			if s.Stats().Requests[wire.CmdFlush] == 0 {
				t.Errorf("no flush counted")
			}
		})
	}
}
