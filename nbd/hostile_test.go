package nbd_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

// hostileClients are, in the long variant, as many as a server lets in but for
// one.
func hostileClients() int {
	if os.Getenv("FIRN_TEST_LONG") != "" {
		return 127
	}
	return 16
}

// TestHostileClientsMemory: whatever clients do that read no replies, a server
// with default options holds no more than Options says, and another client is
// served meanwhile.
func TestHostileClientsMemory(t *testing.T) {
	request := func(r wire.Request) []byte { return wire.AppendRequest(nil, wire.StructuredReplies, r) }
	clients := hostileClients()
	write := request(wire.Request{Command: wire.CmdWrite, Length: 512})
	for _, c := range []struct {
		name, env string
		request   []byte
	}{
		{"large reads", "FIRN_NBD_TEST_STEP=4096", request(wire.Request{Command: wire.CmdRead, Length: 32 << 20})},
		{"lent reads", "FIRN_NBD_TEST_STEP=4096", request(wire.Request{Command: wire.CmdRead, Length: 128 << 10})},
		{"small reads", "FIRN_NBD_TEST_NO_LENDING=1", request(wire.Request{Command: wire.CmdRead, Length: 512})},
		{"small writes", "", append(write, make([]byte, 512)...)},
		{"status", "FIRN_NBD_TEST_STEP=8192", request(wire.Request{Command: wire.CmdBlockStatus, Length: 1 << 30})},
		{"failures", "", request(wire.Request{Command: wire.CmdRead, Offset: 1 << 62, Length: 1})},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			addr, pid := startServer(t, "unix", c.env, nil)
			start := peakMemory(t, pid)
			good := dial(t, addr, client.Options{})
			var wg sync.WaitGroup
			for range clients {
				r := rawEnter(t, addr, "vol", true)
				wg.Go(func() { flood(t, r.nc, c.request) })
			}
			wg.Wait()
			for i := range 200 {
				if err := good.Do(t.Context(), &client.Call{Command: wire.CmdRead, Off: uint64(i) << 20, Data: make([]byte, 64<<10)}); err != nil {
					t.Fatal(err)
				}
			}
			peak := peakMemory(t, pid)
			t.Logf("%d clients: peak %d MiB", clients, peak>>20)
			// What Options says, and as much again as the collector lets the
			// heap grow: all but the payload above the connections' own.
			limit := start + int64(2*clients)<<21 + 128<<20 + 64<<20
			if peak > limit && !raceDetector {
				t.Errorf("%d MiB resident, at most %d are meant", peak>>20, limit>>20)
			}
		})
	}
}

// flood sends requests until the server has taken no more for a while.
func flood(t *testing.T, nc net.Conn, request []byte) {
	var all []byte
	for len(all) < 256<<10 {
		all = append(all, request...)
	}
	for range 16 {
		nc.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := nc.Write(all); err != nil {
			return
		}
	}
}

// peakMemory returns the largest resident memory that a process has had.
func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if kib, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(kib), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}
