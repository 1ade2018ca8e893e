package cluster

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"firn.io/firn/internal/block"
)

// TestLostNodeIsLoggedOnce, however much is asked of it.
func TestLostNodeIsLoggedOnce(t *testing.T) {
	s := newScripted(t, 1<<30)
	var log bytes.Buffer
	s.client.log = slog.New(slog.NewTextHandler(&log, nil))
	a := s.attach()
	s.silent[1] = true
	for c := block.Chunk(0); c < 6; c++ {
		s.write(a, c, 0, 1)
	}
	s.RunFor(20 * time.Second)
	if n := strings.Count(log.String(), "node is lost"); n != 1 || !strings.Contains(log.String(), "node=1") {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
}

// TestTakenIDIsLoggedOnce: a gateway whose id is another's tries on, and the log
// tells why once.
func TestTakenIDIsLoggedOnce(t *testing.T) {
	s := newScripted(t, 1<<30)
	s.RunFor(time.Second)
	var log bytes.Buffer
	other := s.newClient("gw", "elsewhere")
	other.log = slog.New(slog.NewTextHandler(&log, nil))
	s.RunFor(20 * time.Second)
	if n := strings.Count(log.String(), "gateway is not registered"); n != 1 || !strings.Contains(log.String(), "is running already") {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
}
