package gateway

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"firn.io/firn/internal/block"
)

// TestRefusedAttachIsLoggedOnce: clients try again and again; the log tells of a
// reason once, until the volume could be attached.
func TestRefusedAttachIsLoggedOnce(t *testing.T) {
	s, g := newShop(t, time.Millisecond)
	var log bytes.Buffer
	g.opt.Log = slog.New(slog.NewTextHandler(&log, nil))
	refuse := func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.err = err
	}
	try := func(times int) {
		for range times {
			if _, err := g.Open(t.Context(), "test"); block.KindOf(err) != block.Unavailable {
				t.Fatal(err)
			}
		}
	}
	refuse(block.Errorf(block.Unavailable, "3 groups have no majority"))
	try(5)
	refuse(nil)
	open(t, g, "test").Release()
	if err := g.Detach(t.Context(), block.VolumeID{1}, true); err != nil && block.KindOf(err) != block.NotFound {
		t.Fatal(err)
	}
	refuse(block.Errorf(block.Unavailable, "3 groups have no majority"))
	try(3)
	if n := strings.Count(log.String(), "volume cannot be attached"); n != 2 || !strings.Contains(log.String(), "no majority") {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
}
