package scsi

import (
	"context"
	"encoding/json"
	"sync"

	"firn.io/firn/internal/block"
)

// Store keeps the persistent reservations of one unit: a small text with a
// version, so that the gateways that share a unit never overwrite one another.
type Store interface {
	// Load returns what was saved last and its version; nothing, at version 0,
	// if that never happened.
	Load(ctx context.Context) (text []byte, version int64, err error)
	// Save replaces what Load returned with version: it is durable on return. It
	// fails with kind Busy if another has saved meanwhile.
	Save(ctx context.Context, text []byte, version int64) (newVersion int64, err error)
}

// MemoryStore is a Store that lives as long as the process.
type MemoryStore struct {
	mu      sync.Mutex
	text    []byte
	version int64
}

// Load implements Store.
func (s *MemoryStore) Load(context.Context) ([]byte, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text, s.version, nil
}

// Save implements Store.
func (s *MemoryStore) Save(_ context.Context, text []byte, version int64) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if version != s.version {
		return 0, block.Errorf(block.Busy, "the reservations have changed")
	}
	s.text, s.version = text, version+1
	return s.version, nil
}

// prState is the persistent reservation state of a unit. Its JSON form is what
// the Store keeps; Format tells its shape.
type prState struct {
	Format int `json:"format"`
	// Generation is PRGENERATION.
	Generation uint32 `json:"generation"`
	// PowerLoss is the last APTPL. The state outlives the gateway in any case.
	PowerLoss     bool           `json:"aptpl"`
	Registrations []registration `json:"registrations"`
	// Type is 0 without a reservation.
	Type byte `json:"type"`
	// Holder holds it, unless all registrants do.
	Holder identity `json:"holder"`
}

// identity is an I_T nexus as reservations know it, whether it is there or not.
type identity struct {
	Initiator string `json:"initiator"`
	Port      uint16 `json:"port"`
}

type registration struct {
	identity
	Key uint64 `json:"key"`
}

const prFormat = 1

// maxRegistrations bounds the registrations of a unit.
const maxRegistrations = 256

func (n *Nexus) identity() identity { return identity{n.Initiator, n.Port} }

func (s *prState) find(id identity) int {
	for i, r := range s.Registrations {
		if r.identity == id {
			return i
		}
	}
	return -1
}

// allHold tells whether every registrant holds the reservation.
func (s *prState) allHold() bool {
	return s.Type == typeWriteExclusiveAll || s.Type == typeExclusiveAll
}

func (s *prState) holds(id identity) bool {
	return s.Type != 0 && (s.allHold() && s.find(id) >= 0 || s.Holder == id)
}

// remove drops a registration; a reservation that its going ends is ended.
func (s *prState) remove(i int) {
	id := s.Registrations[i].identity
	s.Registrations = append(s.Registrations[:i:i], s.Registrations[i+1:]...)
	if s.Type != 0 && (s.allHold() && len(s.Registrations) == 0 || !s.allHold() && s.Holder == id) {
		s.Type, s.Holder = 0, identity{}
	}
}

func (s prState) clone() prState {
	s.Registrations = append([]registration(nil), s.Registrations...)
	return s
}

func decodeState(text []byte) (prState, error) {
	s := prState{Format: prFormat}
	if len(text) == 0 {
		return s, nil
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, block.Wrap(block.Corrupt, err, "persistent reservations")
	}
	if s.Format != prFormat {
		return s, block.Errorf(block.Unsupported, "persistent reservations of format %d, this firn knows %d", s.Format, prFormat)
	}
	if len(s.Registrations) > maxRegistrations {
		return s, block.Errorf(block.Corrupt, "%d persistent registrations, at most %d are possible", len(s.Registrations), maxRegistrations)
	}
	return s, nil
}
