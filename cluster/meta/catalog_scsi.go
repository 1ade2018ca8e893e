package meta

import (
	"context"

	"firn.io/firn/internal/block"
)

// MaxReservationsBytes bounds the reservations of one volume.
const MaxReservationsBytes = 128 << 10

// Reservations returns the persistent reservations of a volume, in the form
// that the SCSI target gives them, and the revision of their last change: 0 if
// there never was one.
func Reservations(ctx context.Context, s Store, id block.VolumeID) ([]byte, Revision, error) {
	kv, err := s.Get(ctx, ReservationsKey(id))
	return kv.Value, kv.Modified, err
}

// PutReservations replaces what Reservations returned with revision at, and
// returns the new revision. Kind Busy: somebody else has changed them since;
// NotFound: the volume is gone.
func PutReservations(ctx context.Context, s Store, id block.VolumeID, text []byte, at Revision) (Revision, error) {
	if len(text) > MaxReservationsBytes {
		return 0, block.Errorf(block.NoSpace, "persistent reservations of %d bytes, the limit is %d", len(text), MaxReservationsBytes)
	}
	key := ReservationsKey(id)
	r, err := s.Txn(ctx, Txn{
		If:   []Cond{Unchanged(KV{Key: key, Modified: at}), Present(VolumeKey(id))},
		Then: []Op{Put(key, text, 0)},
		Else: []Op{Read(VolumeKey(id))},
	})
	switch {
	case err != nil:
		return 0, err
	case r.Succeeded:
		return r.Revision, nil
	case !r.Read[0].Exists():
		return 0, block.Errorf(block.NotFound, "volume %v is gone", id)
	}
	return 0, block.Errorf(block.Busy, "the persistent reservations of volume %v have changed meanwhile", id)
}
