package nbd_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
)

// TestLogOfAClientThatLeft properly has no error in it.
func TestLogOfAClientThatLeft(t *testing.T) {
	var log bytes.Buffer
	d := blocktest.New(blocktest.Options{Bytes: 1 << 20, Name: "vol"})
	addr, s := serve(t, nbd.Fixed{*device.Export(d, nil)}, nbd.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	c := dial(t, addr, client.Options{Export: "vol"})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	if text := log.String(); !strings.Contains(text, "client left") || strings.Contains(text, "error") || strings.Contains(text, "<nil>") {
		t.Errorf("%s", text)
	}
}
