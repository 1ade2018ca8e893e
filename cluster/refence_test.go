package cluster

import (
	"testing"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
)

// TestRefenceWaitsForTheOther: the gateway whose epoch the groups knew, and the
// store did not, may serve reads within its lease: nothing is written before
// that has run out (F3).
func TestRefenceWaitsForTheOther(t *testing.T) {
	s := newScripted(t, 1<<30)
	a := s.attach()
	seen := a.Owner().Epoch + 3
	for g := block.GroupID(1); g <= testGroups; g++ {
		s.groups[g].record.Epoch, s.groups[g].record.Nonce = seen, 99
	}
	var fenced, written clock.Instant
	s.script = func(q asked) bool {
		switch c := q.req.Command; {
		case c.Epoch <= seen:
		case c.Type == wire.CmdFence:
			fenced = s.Now()
		case c.OpSeq != 0 && written == 0:
			written = s.Now()
		}
		return false
	}
	o := s.write(a, 0, 0, 1)
	s.until("the write", func() bool { return o.ended })
	if o.err != nil || fenced == 0 || written.Sub(fenced) < meta.OwnerTTL {
		t.Errorf("%v; written %v after the Fence", o.err, written.Sub(fenced))
	}
	if s.volumeNow().Forced {
		t.Error("the wait is over, and the next owner would wait once more")
	}
}
