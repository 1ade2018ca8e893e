package node

import (
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
)

// replicaLog is raftgroup's Log over one replica's seglog.
type replicaLog struct{ log *seglog.Replica }

// FirstIndex implements raftgroup.Log.
func (l replicaLog) FirstIndex() uint64 { return l.log.FirstIndex() }

// LastIndex implements raftgroup.Log.
func (l replicaLog) LastIndex() uint64 { return l.log.LastIndex() }

// Term implements raftgroup.Log.
func (l replicaLog) Term(i uint64) (uint64, bool) { return l.log.Term(i) }

// HardState implements raftgroup.Log.
func (l replicaLog) HardState() raftgroup.HardState { return raftgroup.HardState(l.log.HardState()) }

// Append implements raftgroup.Log.
func (l replicaLog) Append(w raftgroup.LogWrite, done func(error)) {
	sw := seglog.Write{HardState: (*seglog.HardState)(w.HardState), Truncate: (*seglog.EntryID)(w.Truncate)}
	if len(w.Entries) > 0 {
		sw.Entries = make([]seglog.Entry, len(w.Entries))
		for i, e := range w.Entries {
			sw.Entries[i] = seglog.Entry(e)
		}
	}
	l.log.Append(sw, done)
}

// Read implements raftgroup.Log.
func (l replicaLog) Read(lo, hi uint64, maxBytes int, payloads bool) ([]raftgroup.LogEntry, error) {
	entries, err := l.log.Read(lo, hi, maxBytes, payloads)
	if err != nil {
		return nil, err
	}
	out := make([]raftgroup.LogEntry, len(entries))
	for i, e := range entries {
		out[i] = raftgroup.LogEntry(e)
	}
	return out, nil
}
